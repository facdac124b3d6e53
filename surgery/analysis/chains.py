"""Weights that are multiplied with one another: what adapters of rank R on each of them can reach.

Zeng & Lee 2024, "The Expressive Power of Low-Rank Adaptation", arXiv:2310.17513, lemma 1 and its proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from surgery.analysis.norms import Norm
from surgery.analysis.spectra import Pair, singular_values, tails


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
    adapted = torch.eye(error.shape[1]).to(error)
    adapters: list[Pair] = []
    for number, (weight, behind) in enumerate(zip(weights, reversed(later), strict=True)):
        block = right[rank * number : rank * (number + 1)]
        pair = torch.linalg.pinv(behind) @ (error @ block.mT), block @ torch.linalg.pinv(adapted)
        adapted = (weight + pair[0] @ pair[1]) @ adapted
        adapters.append(pair)
    return adapters


def distance(weights: Sequence[Tensor], adapters: Sequence[Pair], target: Tensor, norm: Norm) -> float:
    """How far the product of adapted weights is from the target."""
    moved = [weight + left @ right for weight, (left, right) in zip(weights, adapters, strict=True)]
    return float(tails(singular_values(target - product(moved)), norm)[0])


def spectral_norm(weight: Tensor) -> float:
    """The largest singular value."""
    return float(torch.linalg.matrix_norm(weight, ord=2))
