"""Which rank each change of a weight needs, and each group of weights, and what a lower rank leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from surgery.analysis.groups import measure_group
from surgery.analysis.rows import Row, Wanted, row_of
from surgery.analysis.spectra import Pair, arithmetic, decomposed, dense, rounding, singular_values, truncated
from surgery.analysis.weights import LeftOut, Pairs, Weight
from surgery.compiler.algebra.affine import NotAffine
from surgery.compiler.diagnostics import Diagnostic


@dataclass(frozen=True)
class Comparison:
    """All that is found of two models."""

    base: str
    target: str
    wanted: Wanted
    weights: list[Row]
    groups: list[Row]
    left_out: list[LeftOut]
    warnings: list[Diagnostic]

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON."""
        wanted = self.wanted
        return {
            "base": self.base, "target": self.target, "tolerance": wanted.tolerance, "absolute": wanted.absolute,
            "norm": str(wanted.norm), "rank": wanted.rank,
            "weights": [row.as_dict() for row in self.weights], "groups": [row.as_dict() for row in self.groups],
            "left_out": [{"name": left.name, "reason": left.reason, "changed": left.changed} for left in self.left_out],
        }  # fmt: skip


@torch.no_grad()
def compare(
    base: str, target: str, pairs: Pairs, wanted: Wanted, device: torch.device, *, keep: bool = False,
    heads: int | None = None, progress: Callable[[str], None] = lambda name: None,
) -> tuple[Comparison, dict[str, Pair]]:  # fmt: skip
    """Measure every weight and group, one after the other on the device; with `keep` the adapters come back too.

    The adapters have the chosen ranks and are on the CPU; a weight that did not change has none. With `heads` groups
    are taken head by head.
    """
    weights: list[Row] = []
    groups: list[Row] = []
    left_out = list(pairs.left_out)
    adapters: dict[str, Pair] = {}
    for weight in pairs.weights:
        progress(weight.name)
        try:
            row, pair = _weight(weight, wanted, device, keep)
        except NotAffine as reason:
            left_out.append(LeftOut(weight.name, f"it has no effective weight: {reason}"))
            continue
        weights.append(row)
        adapters |= {} if pair is None else {weight.name: pair}
    for group in pairs.groups:
        progress(group.name)
        row, found = measure_group(group, wanted, device, heads)
        if keep and not row.attained:
            bound = "no adapters of that rank leave less than"
            message = (
                f"the adapters of rank {row.chosen} of `{row.name}` leave {row.reached:.3g}; {bound} {row.error:.3g}"
            )
            pairs.found.warn("SURG075", message, group.product.span)
        groups.append(row)
        adapters |= found
    return Comparison(base, target, wanted, weights, groups, left_out, pairs.found.warnings), adapters


def _weight(weight: Weight, wanted: Wanted, device: torch.device, keep: bool) -> tuple[Row, Pair | None]:
    own, change = weight.own().to(device), weight.change()
    change = (change[0].to(device), change[1].to(device)) if isinstance(change, tuple) else change.to(device)
    triples = decomposed(change) if keep else None
    values = triples[1] if triples else singular_values(change)
    # factors are known by themselves, a matrix as a difference to W
    noise = arithmetic(values, weight.shape, 0.0 if isinstance(change, tuple) else float(own.norm()))
    if weight.rounded is not None:
        noise += rounding(own + dense(change), weight.rounded)
    row = row_of(weight.name, weight.shape, values, float(own.norm()), noise, wanted)
    if triples is None or row.chosen == 0 or row.size == 0:
        return row, None
    left, right = truncated(triples, row.chosen)
    return row, (left.cpu(), right.cpu())
