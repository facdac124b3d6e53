"""Singular values of a change of W, and what a change of a lower rank leaves of it, all in float64.

Eckart & Young 1936, Mirsky 1960: no matrix of rank R is nearer to D than its first R singular triples, in the spectral
norm, where the distance is the next singular value, and in Frobenius', where it is the root of the sum of the squares
of all that follow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surgery.analysis.norms import Norm
from surgery.runtime.report.changes import spectrum_of_product

Pair = tuple[Tensor, Tensor]
Change = Tensor | Pair  # `[..., out, in]`, or its factors `[..., out, rank]` and `[..., rank, in]`


def singular_values(change: Change) -> Tensor:
    """All singular values that may differ from zero, largest first: `[..., k]`."""
    if isinstance(change, tuple):
        return spectrum_of_product(*change)
    if not change.any():  # most weights of a model that was adapted
        return change.new_zeros(*change.shape[:-2], min(change.shape[-2:]))
    found: Tensor = torch.linalg.svdvals(change)
    return found


def tails(values: Tensor, norm: Norm) -> Tensor:
    """What the best change of rank 0, 1 ... k leaves, `[k + 1]`, from singular values `[..., k]`; of experts the worst.

    Eckart & Young 1936, Mirsky 1960.
    """
    if norm is Norm.frobenius:
        values = values.square().flip(-1).cumsum(-1).flip(-1).sqrt()
    left = torch.nn.functional.pad(values, (0, 1))
    return left.flatten(0, -2).max(0).values if left.dim() > 1 else left


def rank_within(left: Tensor, limit: float) -> int:
    """The lowest rank that leaves at most `limit`, by the tails of a change."""
    return int((left > limit).sum())


def numerical_rank(values: Tensor, noise: float) -> int:
    """How many singular values `[..., k]` stand out of noise of that spectral norm; of experts the most."""
    return int((values > noise).sum(-1).max())


def rounding(weight: Tensor, dtype: torch.dtype) -> float:
    """The largest singular value that rounding W `[..., out, in]` to `dtype` adds, as one estimates it.

    The error of an entry w is spread evenly over a unit in its last place, eps |w| at most, so its deviation is at most
    eps |w| / sqrt(12); and a matrix of independent entries has no singular value that is much larger than the largest
    norm of a row and that of a column of deviations together (Bandeira & van Handel 2016, arXiv:1408.6185, thm. 1.1).
    """
    bounds = torch.finfo(dtype)
    spread = weight.abs().clamp(min=bounds.tiny) * (bounds.eps / math.sqrt(12))
    return float((spread.norm(dim=-1).amax(-1) + spread.norm(dim=-2).amax(-1)).max())


def arithmetic(values: Tensor, shape: tuple[int, ...], size: float = 0.0) -> float:
    """How exact singular values are that float64 gives, of a matrix computed from numbers of that size."""
    return torch.finfo(torch.float64).eps * max(shape[-2:]) * (float(values.max()) + size if values.numel() else size)


def decomposed(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    """`U [..., out, k]`, singular values `[..., k]` and `V' [..., k, in]` of a change."""
    if not isinstance(change, tuple):
        found: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(change, full_matrices=False)
        return found
    first, second = torch.linalg.qr(change[0]), torch.linalg.qr(change[1].mT)
    left, values, right = torch.linalg.svd(first.R @ second.R.mT, full_matrices=False)
    return first.Q @ left, values, right @ second.Q.mT


def truncated(triples: tuple[Tensor, Tensor, Tensor], rank: int) -> Pair:
    """The nearest change of a rank (or less, where it has less): left `[..., out, rank]`, right `[..., rank, in]`.

    Eckart & Young 1936, from `decomposed`; both factors get the roots of the singular values.
    """
    left, values, right = triples
    root = values[..., :rank].sqrt()
    return left[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * right[..., :rank, :]


def dense(change: Change) -> Tensor:
    """A change as a matrix `[..., out, in]`."""
    return change[0] @ change[1] if isinstance(change, tuple) else change
