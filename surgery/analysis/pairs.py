"""Two models side by side: which weights are compared, and which products of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from surgery.analysis.adapted import OverBase, is_adapted, open_adapted
from surgery.analysis.checkpoint import Checkpoint, open_checkpoint
from surgery.analysis.checkpoints import Checkpoints
from surgery.analysis.products import Product, check_pattern, is_meant, products_of
from surgery.analysis.weights import Group, Pairs, Sides
from surgery.compiler.diagnostics import fail


def pair(
    base: Checkpoint, target: str, groups: Sequence[str] = (), only: Sequence[str] = (), leave: Sequence[str] = (),
    task: str | None = None,
) -> Pairs:  # fmt: skip
    """Match the weights of a base with those of a target by name.

    `groups` are products of weights (`products_of`), `only` and `leave` patterns of names. Raises SURG030 for what
    cannot be read, SURG074 for models that have nothing, or not the same blocks, in common.
    """
    sides: Sides
    if is_adapted(Path(target)):
        sides = OverBase(base, open_adapted(Path(target), base, task))
    else:
        sides = Checkpoints(base, open_checkpoint(target, like=base))
    products = [found for text in groups for found in products_of(text, sides.base_names, sides.target_names)]
    grouped = _once(products)
    for option, patterns in (("--only", only), ("--except", leave)):
        for pattern in patterns:
            check_pattern(pattern, sides.names, option)
    pairs = Pairs()
    sides.fill(pairs, [name for name in sides.names if name not in grouped and _is_wanted(name, only, leave)])
    for product in products:
        base_factors = [sides.of_base(factor) for factor in reversed(product.base)]
        target_factors = [sides.of_target(factor) for factor in reversed(product.target)]
        pairs.groups.append(Group(product, base_factors, target_factors))
    if not pairs.weights and not pairs.groups:
        help = "compare two models of one architecture, or say which products of weights belong together: --group"
        raise fail("SURG074", f'"{base.name}" and "{target}" have no matrix in common', help=help)
    return pairs


def _once(products: Iterable[Product]) -> set[str]:
    """The names in products; SURG074 for a weight of the base that is in two of them: it would get two adapters."""
    seen: set[str] = set()
    for product in products:
        for factor in product.base:
            if factor.name in seen:
                message = f"`{factor.name}` is in two products, or twice in one"
                raise fail("SURG074", message, product.span, help="a weight belongs to one group")
            seen.add(factor.name)
    return seen | {factor.name for product in products for factor in product.target}


def _is_wanted(name: str, only: Sequence[str], leave: Sequence[str]) -> bool:
    inside = not only or any(is_meant(pattern, name, "--only") for pattern in only)
    return inside and not any(is_meant(pattern, name, "--except") for pattern in leave)
