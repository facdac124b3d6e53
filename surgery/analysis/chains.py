"""Weights that are multiplied with one another: what adapters of rank R on each of them can reach.

Zeng & Lee 2024, "The Expressive Power of Low-Rank Adaptation", arXiv:2310.17513, lemma 1 and its proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from surgery.analysis.norms import Norm
from surgery.analysis.spectra import Change, Pair, singular_values, tails


def product(weights: Sequence[Tensor]) -> Tensor:
    """`W_L @ ... @ W_1` of weights in the order in which they are applied, `[out, in]` each."""
    return reduce(lambda so_far, weight: weight @ so_far, weights)


def construct(weights: Sequence[Tensor], target: Tensor, rank: int) -> list[Pair]:
    """Adapters of at most a rank for each weight, with which the product is as near to the target as it can be.

    `weights` are W_1 ... W_L `[out, in]` in the order in which they are applied, `target` is `[out of W_L, in of W_1]`.
    With `E = target - W_L ... W_1 = U S V'`, adapter l takes V_l, the l-th `rank` columns of V:
    `A_l = (W_L ... W_{l+1})^-1 E V_l` and `B_l' = V_l' ((W_{l-1} + A_{l-1} B_{l-1}') ... (W_1 + A_1 B_1'))^-1`, so that
    `W_l + A_l B_l'` in place of W_l adds `E V_l V_l'` to the product. The distance is then the singular value number
    `rank L + 1` of E, below which no such adapters come. The inverses are Moore & Penrose's: they serve where later
    weights map onto the outputs, and adapted earlier ones keep the inputs apart (`distance` shows it).
    """
    error = target - product(weights)
    right = torch.linalg.svd(error, full_matrices=False).Vh
    later = [torch.eye(len(error)).to(error)]  # products of the weights behind each, from the last one on
    for weight in reversed(weights[1:]):
        later.append(later[-1] @ weight)
    before = torch.eye(error.shape[1]).to(error)  # the product of the adapted weights in front
    adapters: list[Pair] = []
    for number, (weight, behind) in enumerate(zip(weights, reversed(later), strict=True)):
        block = right[rank * number : rank * (number + 1)]
        pair = torch.linalg.pinv(behind) @ (error @ block.mT), block @ torch.linalg.pinv(before)
        before = (weight + pair[0] @ pair[1]) @ before
        adapters.append(pair)
    return adapters


def adapted(weights: Sequence[Tensor], adapters: Sequence[Pair]) -> list[Tensor]:
    """The weights with what is added to them."""
    return [weight + left @ right for weight, (left, right) in zip(weights, adapters, strict=True)]


def difference(weights: Sequence[Tensor], targets: Sequence[Tensor]) -> Change:
    """The product of the targets less that of the weights; of weights cut into heads as narrow factors."""
    if weights[0].dim() == 2:
        return product(targets) - product(weights)
    # as sums of what changed, so that what did not change cancels exactly
    return torch.cat([targets[1] - weights[1], weights[1]], -1), torch.cat([targets[0], targets[0] - weights[0]], -2)


def distance(weights: Sequence[Tensor], targets: Sequence[Tensor], norm: Norm) -> float:
    """How far the product of weights is from that of targets; of heads the farthest."""
    return float(tails(singular_values(difference(weights, targets)), norm)[0])


def cut(first: Tensor, second: Tensor, heads: int) -> tuple[Tensor, Tensor] | None:
    """Two weights cut into heads, `[heads, d, in]` and `[heads, out, d]`; None where they cannot be.

    One side may have fewer, each of which serves as many heads of the other, as in attention with grouped queries.
    """
    width, rest = divmod(max(first.shape[0], second.shape[1]), heads)
    if rest or first.shape[0] % width or second.shape[1] % width:
        return None
    rows = first.reshape(-1, width, first.shape[1])
    columns = second.reshape(len(second), -1, width).transpose(0, 1)
    if heads % len(rows) or heads % len(columns):
        return None
    return rows.repeat_interleave(heads // len(rows), 0), columns.repeat_interleave(heads // len(columns), 0)


def spectral_norm(weight: Tensor) -> float:
    """The largest singular value; of several matrices `[..., out, in]` the largest."""
    return float(torch.linalg.matrix_norm(weight, ord=2).max())
