"""Constructed adapters as a folder that peft loads, and `surgery import`: a LoRA of its own rank for each weight."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

import surgery
from surgery import builders
from surgery.analysis.checkpoint import HERE, Checkpoint
from surgery.analysis.checkpoints import ALONE
from surgery.analysis.spectra import Pair
from surgery.analysis.weights import Pairs, listed
from surgery.compiler import nodes
from surgery.compiler.diagnostics import Diagnostic, Note, fail
from surgery.compiler.pattern import matches, parse_pattern
from surgery.compiler.printer import show
from surgery.compiler.skeleton import Skeleton
from surgery.compiler.weights import Layout, Weight
from surgery.peft.names import HEADS, TASKS
from surgery.peft.patterns import patterns_of
from surgery.peft.write import check_folder, export, method_of
from surgery.runtime.export import Factors
from surgery.runtime.models import CLASSES
from surgery.runtime.report.changes import Reached

HELP = "leave it out: --except PATTERN"


def write_adapters(
    base: Checkpoint, adapters: Mapping[str, Pair], pairs: Pairs, target: Path, dtype: torch.dtype
) -> list[Diagnostic]:
    """Write `left @ right` for weights of the base, by their names there, as an adapter of peft of these ranks.

    The warnings say what of the target they do not hold. Raises SURG064 where there is nothing to write, for weights
    that have no place in the base's class, and as `skeleton_for` does.
    """
    skeleton = skeleton_for(base, target)
    if not adapters:
        raise fail("SURG064", "no weight has changed, so there are no adapters to write", help="compare other models")
    untied = {weight.name for weight in pairs.weights if weight.untied}
    places = {name: _place(base, skeleton, name, name in untied) for name in adapters}
    if lacking := [f"`{name}`" for name, place in places.items() if place is None]:
        name = type(skeleton.model).__name__
        message = f"{len(lacking)} weights are no parameters of {name}, which joins or cuts what its files hold"
        raise fail("SURG064", message, notes=[Note(listed(lacking))], help=HELP)
    found = {name: place for name, place in places.items() if place is not None}
    rules = _rules(skeleton, found, adapters, untied)
    program = surgery.parse(show(nodes.Tree((_model(base), *rules))), HERE)
    plan = surgery.plan(program)
    by_path = {place.path: _laid_out(adapters[name], base.layout(name), place) for name, place in found.items()}
    if TASKS.get(base.model.task or "") in HEADS:
        # peft keeps the heads of these tasks whole, whose numbers are not at hand: here they are weights like others
        plan = plan.model_copy(update={"model": plan.model.model_copy(update={"task": None})})
    run = Reached(plan, skeleton.model, {}, 0)
    made = export(run, HERE, target, dtype, factors=lambda _, site: Factors(*by_path[site.path]), own_ranks=True)
    lost = [f"`{left.name}`" for left in pairs.left_out if left.changed or left.reason == ALONE["target"]]
    message = f"the adapters do not hold what is left out of the comparison: {listed(lost)}"
    return [*made.warnings, *([Diagnostic("SURG075", message, severity="warning")] if lost else [])]


def skeleton_for(base: Checkpoint, target: Path) -> Skeleton:
    """The base without numbers. Raises SURG064 where no adapters of it can be written to a folder."""
    check_folder(target)
    if base.skeleton is None:
        message = f'of which class "{base.name}" is cannot be told from its config, and adapters belong to modules'
        raise fail("SURG064", message, help=f"give its task: --task {'|'.join(CLASSES)}")
    return base.skeleton


def _place(base: Checkpoint, skeleton: Skeleton, name: str, untied: bool) -> Weight | None:
    """The weight of a module, or a parameter, that a tensor of the base is; of tied ones the head's, as `tie` wants."""
    real = base.parameter(name)
    if real is None:
        return None
    names = [real] if untied else skeleton.owners[id(skeleton.parameters[real])]
    found = [place for place in map(skeleton.weight, names) if isinstance(place, Weight)]
    return min(found, key=lambda place: place.layout.module_class == "Embedding", default=None)


def _laid_out(pair: Pair, own: Layout | str | None, place: Weight) -> Pair:
    """Factors of W as the place has it, of which the tensor of that name may be the transpose."""
    turned = isinstance(own, Layout) and own.transposed != place.layout.transposed
    return (pair[1].mT, pair[0].mT) if turned else pair


def _model(base: Checkpoint) -> nodes.Model:
    model = base.model
    name = model.name if not Path(model.name).is_dir() or Path(model.name).is_absolute() else f"./{model.name}"
    task: object = model.task if model.labels is None else builders.call(str(model.task), labels=model.labels)
    return builders.model(name, task=task)


def _rules(
    skeleton: Skeleton, places: Mapping[str, Weight], adapters: Mapping[str, Pair], untied: Collection[str]
) -> Iterator[nodes.Item]:
    """A rule for every rank and every pattern of the weights that have it."""
    groups: dict[tuple[int, str | None], list[str]] = {}
    for name, place in places.items():
        names = skeleton.owners[place.identity]
        alike = [other for other, found in places.items() if found.identity == place.identity]
        if len(alike) > 1:
            message = f"`{alike[0]}` and `{alike[1]}` are tied in the base, and each has a change of its own"
            raise fail("SURG064", message, help=HELP)
        alias = None if len(names) == 1 else "untie" if name in untied else "tie"
        groups.setdefault((adapters[name][0].shape[-1], alias), []).append(place.path)
    known = [*skeleton.modules, *skeleton.parameters]
    for (rank, alias), paths in groups.items():
        for pattern in patterns_of(paths, known):
            parts = parse_pattern(nodes.Pattern(pattern))
            count = sum(matches(parts, path) for path in paths)
            yield builders.adapt(pattern, method_of(rank), expect=count, alias=alias)
