"""Methods that users expect beside those of the papers: Hadamard products, rotations, random pairs, spectra, grids."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Parameters = dict[str, Any]
Output = Callable[[Tensor, Tensor], Tensor]


def vera(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """One pair for all sites, cut to the site's size; equation 2 of arXiv:2310.11454."""
    out, inside = W.shape
    return W + t["b"][:, None] * (t["B"].detach()[:out] * t["d"]) @ t["A"].detach()[:, :inside]


def loha(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    rows = []
    for i in range(len(W)):
        rows.append((t["B1"][i] @ t["A1"]) * (t["B2"][i] @ t["A2"]))
    return W + p["alpha"] / p["rank"] * torch.stack(rows)


def abba(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    rows = []
    for i in range(len(W)):
        rows.append((t["B1"][i] @ t["A1"]) * (t["B2"][i] @ t["A2"]))
    return W + p["alpha"] ** 2 / math.sqrt(p["rank"] * p["second"]) * torch.stack(rows)


def hira(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + W * sum(torch.outer(t["B"][:, k], t["A"][k]) for k in range(p["rank"]))


def delora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """Every term is a matrix of unit norm, times the strength; no norm is taken below 1e-4."""
    columns = W.square().sum(dim=0).sqrt()
    total = torch.zeros_like(W)
    for k in range(p["rank"]):
        a, b = (v.square().sum().sqrt().clamp(min=1e-4) for v in (t["A"][k], t["B"][:, k]))
        total = total + torch.outer(t["B"][:, k] / b, t["A"][k] / a * columns)
    return W + t["s"] / p["rank"] * total


def lokr(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """Block (i, j) of a factor x factor grid is C[i, j] times one low-rank matrix."""
    block = t["B"] @ t["A"]
    rows = [torch.cat([entry * block for entry in row], dim=1) for row in t["C"]]
    return W + p["alpha"] / p["rank"] * torch.cat(rows, dim=0)


def gralora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    rows = [torch.cat([t["B"][i, j] @ t["A"][i, j] for j in range(p["k"])], dim=1) for i in range(p["k"])]
    return W + p["alpha"] / p["rank"] * torch.cat(rows, dim=0)


def miss(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + torch.stack([t["D"][:, j % p["rank"]] for j in range(W.shape[1])], dim=1)


def _rotation(entries: Tensor, size: int) -> Tensor:
    """(I + Q)(I - Q)^-1 of the skew-symmetric Q whose entries above the diagonal are given row by row."""
    numbers = iter(entries)
    above = {(i, j): next(numbers) for i in range(size) for j in range(i + 1, size)}
    zero = entries.new_zeros(())
    rows = [[above.get((i, j), -above.get((j, i), zero)) for j in range(size)] for i in range(size)]
    skew, one = torch.stack([torch.stack(row) for row in rows]), torch.eye(size, dtype=entries.dtype)
    return (one + skew) @ torch.linalg.inv(one - skew)


def oft(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    size = p["block"]
    blocks = [W[:, k * size : (k + 1) * size] @ _rotation(entries, size) for k, entries in enumerate(t["q"])]
    return torch.cat(blocks, dim=1)


def psoft(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """The principal part U S V of W itself becomes U S diag(b) R diag(a) V; the rest stays."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    r = p["rank"]
    flip = (Vh[:r] @ t["A"].detach().T).diagonal().sign()  # a pair of singular vectors has no sign
    left, right = U[:, :r] * flip * S[:r], flip[:, None] * Vh[:r]
    turned = t["b"][:, None] * _rotation(t["q"], r) * t["a"]
    return W - left @ right + left @ turned @ right


def kasa(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """W without its smallest singular components, and a change with singular values of its own."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    kept = len(S) - p["rank"]
    return (U[:, :kept] * S[:kept]) @ Vh[:kept] + p["alpha"] / p["rank"] * (t["B"] * t["d"]) @ t["A"]


def kasa_penalty(t: Tensors, p: Parameters) -> Tensor:
    """Of the singular values, and of both factors for not being orthonormal: eq. 9 to 11."""
    eye = torch.eye(p["rank"], dtype=torch.float64)
    apart = [torch.linalg.matrix_norm(gram - eye) for gram in (t["A"] @ t["A"].T, t["B"].T @ t["B"])]
    return p["beta"] * t["d"].square().sum() + p["gamma"] * (apart[0] + apart[1])


def c3a(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """Block (i, j) has w[i, j] as its first row, and every further row is turned by one to the right."""
    rows = []
    for generators in t["w"]:
        blocks = [torch.stack([w.roll(k) for k in range(p["block"])]) for w in generators]
        rows.append(torch.cat(blocks, dim=1))
    return W + torch.cat(rows, dim=0) / W.shape[1]


def fourierft(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """A sum of plane waves with the trained amplitudes: the real part of the inverse transform, written out."""
    out, inside = W.shape
    rows, columns = torch.arange(out, dtype=W.dtype)[:, None], torch.arange(inside, dtype=W.dtype)
    for amplitude, position in zip(t["c"], t["E"].tolist(), strict=True):
        u, v = divmod(int(position), inside)
        phase = 2 * math.pi * (u * rows / out + v * columns / inside)
        W = W + p["alpha"] * amplitude * torch.cos(phase) / (out * inside)
    return W


def _random_sum(t: Tensors, p: Parameters, large: int, small: int) -> Tensor:
    """The sum over terms of B_j diag(l_j) A diag(g_j); column k of B_j is column k * terms + j of what is stored."""
    rank, total = p["rank"], torch.zeros(large, small, dtype=t["A"].dtype)
    terms = math.ceil(small / rank)
    for j in range(terms):
        own = [k * terms + j for k in range(rank)]
        left, right = t["B"].detach()[:large, own], t["A"].detach()[:, :small]
        total = total + (left * t["l"][own]) @ right * t["g"][j]
    return p["alpha"] / rank * total


def randlora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + _random_sum(t, p, *W.shape)


def randlora_wide(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + _random_sum(t, p, *W.T.shape).T


def ia3(W: Tensor, t: Tensors, p: Parameters) -> Output:
    return lambda x, y: t["l"] * y


def ia3_input(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return torch.stack([t["l"][j] * W[:, j] for j in range(W.shape[1])], dim=1)


def bitfit(W: Tensor, t: Tensors, p: Parameters) -> Output:
    return lambda x, y: y + t["b"]


def ln_tuning(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + (t["g"] if W.dim() == 1 else torch.diag(t["g"]))  # of a norm, W is its vector
