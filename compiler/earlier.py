"""Which sites of earlier blocks a site reads, where its method says `previous`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.compiler.algebra.compose import calls
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.previous import coordinate, leaves
from surgery.compiler.diagnostics import fail
from surgery.compiler.plan import Site
from surgery.compiler.program import Rule
from surgery.compiler.skeleton import Skeleton
from surgery.compiler.weights import Weight

Paths = Mapping[int, str]  # how many blocks earlier, and the path of the site there


def earlier_paths(rule: Rule, weights: Sequence[Weight], skeleton: Skeleton) -> dict[str, dict[int, str]]:
    """For every weight of a rule the others of its kind in earlier blocks of its list; nothing if no one asks."""
    if not any(call.function == "previous" for statement in rule.method.statements for call in calls(statement)):
        return {}
    found: dict[str, dict[int, str]] = {}
    known: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for weight in weights:
        block = skeleton.block(weight.path)
        if block is not None:
            same = known.setdefault((block[0], skeleton.kind(weight.path)), [])
            found[weight.path] = {block[1] - index: path for index, path in same if index < block[1]}
            same.append((block[1], weight.path))
    return found


def coordinates(paths: Paths) -> dict[str, int]:
    """What a formula is told of them: for which distances there is a site."""
    return {coordinate(back): 1 for back in paths}


def earlier_tensors(formula: MethodFormula, shape: tuple[int, int], rule: Rule, paths: Paths,
                    sites: Sequence[Site]) -> tuple[dict[str, str], dict[str, str]]:  # fmt: skip
    """Leaf to the key of the tensor that it is, and leaf to the path of the site whose x it is.

    Raises SURG005 where the earlier site has other sizes.
    """
    tensors: dict[str, str] = {}
    inputs: dict[str, str] = {}
    for leaf, (name, back) in leaves(formula).items():
        site = next((site for site in sites if site.path == paths[back]), None)
        if site is None:  # it did not fit, which is said already
            continue
        if site.shape != shape:
            message = f"`previous` reads `{site.path}` {list(site.shape)}, this site is {list(shape)}"
            raise fail("SURG005", message, rule.method_span)
        if name == "x":
            inputs[leaf] = site.path
        else:
            tensors[leaf] = site.parameter if name == "W" else _key(site, name)
    return tensors, inputs


def _key(site: Site, name: str) -> str:
    return next(tensor.key for tensor in site.tensors if tensor.name == name)
