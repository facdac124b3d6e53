"""Square matrices of few numbers, entry by entry, and MoRA's square matrix between a compression and its inverse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Parameters = dict[str, Any]


def _circ(v: Tensor) -> Tensor:
    n = len(v)
    i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    return v[(i - j) % n]


def _skew_circ(v: Tensor) -> Tensor:
    n = len(v)
    rows = [[v[i - j] if i >= j else -v[i - j + n] for j in range(n)] for i in range(n)]
    return torch.stack([torch.stack(row) for row in rows])


def _toeplitz(column: Tensor, row: Tensor) -> Tensor:
    n = len(column)
    rows = [[column[i - j] if i >= j else row[j - i] for j in range(n)] for i in range(n)]
    return torch.stack([torch.stack(entries) for entries in rows])


def circulant(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + _circ(t["a"] * t["b"])


def circulant_blocks(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    generators = t["a"] * t["b"]
    rows = [torch.cat([_circ(v) for v in row], dim=1) for row in generators]
    return W + torch.cat(rows, dim=0)


def symmetric_toeplitz(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + _toeplitz(t["b"], t["b"]) @ _toeplitz(t["a"], t["a"])


def toeplitz(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    n = len(W)  # the first n numbers are the first column, the others the first row behind its first entry
    left, right = (_toeplitz(t[name][:n], torch.cat([t[name][:1], t[name][n:]])) for name in ("b", "a"))
    return W + left @ right


def kronecker(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    A, B = t["A"], t["B"]
    (a, b), (c, d) = B.shape, A.shape
    product = B[:, None, :, None] * A[None, :, None, :]  # entry (i c + k, j d + l) is B[i, j] A[k, l]
    return W + p["alpha"] / p["rank"] * product.reshape(a * c, b * d)


def ldr(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    for c, s in zip(t["c"], t["s"], strict=True):
        W = W + _circ(c) @ _skew_circ(s)
    return W


def mora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """Column c % i gains column c % q of M for every c of the padded input; the rows are those of M again and again."""
    (o, i), M = W.shape, t["M"]
    q = math.floor(math.sqrt((o + i) * p["rank"]) + 0.5)
    assert tuple(M.shape) == (q, q)
    rows = M[torch.arange(o) % q]
    columns: list[Tensor] = [torch.zeros(o, dtype=W.dtype) for _ in range(i)]
    for c in range(math.ceil(i / q) * q):
        columns[c % i] = columns[c % i] + rows[:, c % q]
    return W + torch.stack(columns, dim=1)


def mora_rotary(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """Each chunk of the padded input is rotated by its number, meets M, and the results stand one below the other."""
    (o, i), M = W.shape, t["M"]
    q = math.floor(math.sqrt((o + i) * p["rank"]) + 0.5) // 2 * 2
    assert tuple(M.shape) == (q, q)
    n, half = math.ceil(i / q), q // 2
    turned = torch.cat([M[:, half:], -M[:, :half]], dim=1)
    blocks = []
    for j in range(n):
        angles = torch.tensor([j * 10000 ** (-2 * (k % half) / q) for k in range(q)], dtype=W.dtype)
        blocks.append(M * angles.cos() + turned * angles.sin())
    wide = torch.block_diag(*blocks)
    folded = [sum((wide[:, c] for c in range(k + i, n * q, i)), wide[:, k]) for k in range(i)]
    rows = torch.stack(folded, dim=1)
    return W + rows[torch.arange(o) % (n * q)]
