"""Singular value and QR decompositions for starts: signs and draws that no device and no library decides.

The exact decomposition is taken, except of large matrices of which little is wanted: where the smaller side is at least
`LARGE` and three times `POWERS * (rank + MORE)`, the largest singular triples come from a block Krylov space: `POWERS`
products with the matrix on `rank + MORE` vectors drawn on the CPU (Musco and Musco 2015, arXiv:1504.05477).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 1024
POWERS = 8
MORE = 8

Singular = tuple[Tensor, Tensor, Tensor]


def singular(matrix: Tensor, rank: int, seed: int = 0) -> Singular:
    """`rank` singular triples of `[..., m, n]`: `[..., m, r]`, `[..., r]` and `[..., r, n]`, the values descending.

    The smallest ones where `rank` is negative. The largest entry of every right vector is positive.
    """
    if is_truncated(tuple(matrix.shape), rank):
        return taken(_krylov(matrix, rank, torch.Generator().manual_seed(seed)), rank)
    return taken(torch.linalg.svd(matrix, full_matrices=False), rank)


def taken(found: Singular, rank: int) -> Singular:
    """`rank` triples of those found, with their signs fixed."""
    left, values, right = found
    part = _part(rank)
    signs = _signs(right[..., part, :])
    return left[..., :, part] * signs.transpose(-1, -2), values[..., part], right[..., part, :] * signs


def singular_of_gram(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Singular values `[r]` and right vectors `[r, n]` of X from `X.T @ X`, `[n, n]`, as `singular` gives them."""
    values, vectors = torch.linalg.eigh(gram)
    part = _part(rank)
    right = vectors.flip(-1).transpose(-1, -2)[part]
    return values.flip(-1)[part].clamp_min(0).sqrt(), right * _signs(right)


def orthogonal_triangular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` columns of Q and rows of R of `[..., m, n]`, R's diagonal not negative."""
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(matrix.dtype)
    q, r = q * signs.unsqueeze(-2), r * signs.unsqueeze(-1)
    return q[..., :, :rank], r[..., :rank, :]


def is_truncated(shape: tuple[int, ...], rank: int) -> bool:
    """Whether the singular triples of a matrix of this shape are found without the whole decomposition."""
    return len(shape) == 2 and rank > 0 and min(shape) >= max(LARGE, 3 * POWERS * (rank + MORE))


def _part(rank: int) -> slice:
    return slice(0, rank) if rank > 0 else slice(rank, None)


def _signs(right: Tensor) -> Tensor:
    largest = right.gather(-1, right.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(right.dtype)


def _krylov(matrix: Tensor, rank: int, generator: torch.Generator) -> Singular:
    block = torch.randn(matrix.shape[1], rank + MORE, generator=generator).to(matrix)
    blocks = []
    for _ in range(POWERS):
        block = torch.linalg.qr(matrix @ block).Q
        blocks.append(block)
        block = matrix.T @ block
    basis = torch.linalg.qr(torch.cat(blocks, 1)).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right
