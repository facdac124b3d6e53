"""topk_mask(score, density): one at the largest share of the entries, zero elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import whole_of
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure


@structure("topk_mask")
class TopMask(Structure):
    """`[m, n], share -> [m, n]`: round(share * m * n) ones, the first of equal entries first; no gradient passes."""

    arity = 2

    def shape(self, *arguments: Expression) -> Shape:
        score, density = arguments
        if not score.shape or density.value is None:
            raise ShapeProblem("topk_mask takes a matrix of scores and a share between 0 and 1")
        share = density.value.constant
        if share is not None and not 0 <= share <= 1:
            raise ShapeProblem(f"the share of topk_mask is between 0 and 1, this is {density.value}")
        return score.shape

    def learning(self, arguments: Sequence[Expression]) -> Sequence[Expression]:
        return ()

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        score, density = values
        sizes = [whole_of(size) for size in node.shape[-2:]]
        flat = score.detach() if len(sizes) == 1 else score.detach().flatten(-2)
        order = torch.argsort(flat, dim=-1, descending=True, stable=True)
        kept = order.narrow(-1, 0, round(density * math.prod(sizes)))
        mask: Tensor = torch.zeros_like(flat).scatter(-1, kept, 1.0)
        return mask if len(sizes) == 1 else mask.unflatten(-1, sizes)

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[1]
