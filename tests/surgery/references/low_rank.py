"""Products of thin matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Parameters = dict[str, Any]


def lora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / p["rank"] * t["B"] @ t["A"]


def rslora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / p["rank"] ** 0.5 * t["B"] @ t["A"]


def delta_lora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / p["rank"] * t["B"] @ t["A"]  # W moves after steps, not in the equation


def lora_fa(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / p["rank"] * t["B"] @ t["A"].detach()


def geolora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / p["rank"] * t["U"] @ t["S"] @ t["V"]


def asymmetry(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    A = t["A"].detach()
    torch.testing.assert_close(A @ A.T, torch.eye(p["rank"], dtype=A.dtype), rtol=0, atol=1e-6)
    return W + p["alpha"] / p["rank"] * t["B"] @ A


def dora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    V = W + p["alpha"] / p["rank"] * t["B"] @ t["A"]
    norm = (V**2).sum(dim=1).sqrt().detach()
    return (t["m"] / norm)[:, None] * V


def melora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    blocks = [B @ A for A, B in zip(t["A"], t["B"], strict=True)]
    assert len(blocks) == p["groups"]
    return W + p["alpha"] / p["rank"] * torch.block_diag(*blocks)


def lora_mini(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    inner = t["Bt"] @ t["At"]
    return W + p["alpha"] / p["rank"] * t["Bo"].detach() @ inner @ t["Ao"].detach()


def lora_xs(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """U, S, V of W itself: only R is the method's."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    r = p["rank"]
    flip = (U[:, :r].T @ t["U"]).diagonal().sign()  # a pair of singular vectors has no sign
    return W + p["alpha"] / r * (U[:, :r] * flip) @ t["R"] @ (flip[:, None] * S[:r, None] * Vh[:r])


def pissa(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """W less its principal part, plus the factors, which start as that part."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    r = p["rank"]
    scale = p["alpha"] / r
    torch.testing.assert_close(
        scale * p["start"]["B"] @ p["start"]["A"], (U[:, :r] * S[:r]) @ Vh[:r], rtol=0, atol=1e-5
    )
    return (U[:, r:] * S[r:]) @ Vh[r:] + scale * t["B"] @ t["A"]


def olora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """W less the leading part of its QR decomposition, plus the factors, which start as that part."""
    Q, R = torch.linalg.qr(W)
    r = p["rank"]
    scale = p["alpha"] / r
    torch.testing.assert_close(p["start"]["B"] @ p["start"]["A"], Q[:, :r] @ R[:r], rtol=0, atol=1e-5)
    return W - scale * Q[:, :r] @ R[:r] + scale * t["B"] @ t["A"]


def eva(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    A = p["start"]["A"]
    torch.testing.assert_close(A @ A.T, torch.eye(p["rank"], dtype=A.dtype))
    return W + p["alpha"] / p["rank"] * t["B"] @ t["A"]


def cora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """B spans the leading left singular vectors of both checkpoints side by side."""
    both = torch.cat([p["weight_of"](p[name]) for name in ("first", "second")], dim=1)
    U = torch.linalg.svd(both, full_matrices=False).U[:, : p["rank"]]
    flip = (U.T @ t["B"].detach()).diagonal().sign()
    return W + p["alpha"] / p["rank"] * (U * flip) @ t["A"]


def adalora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / (p["rank"] + 1e-5) * (t["P"] * t["E"]) @ t["Q"]


def adalora_penalty(t: Tensors, p: Parameters) -> Tensor:
    """The mean over all sites' Q and P of how far each is from orthonormal, as a Frobenius norm."""
    eye = torch.eye(p["rank"], dtype=torch.float64)
    apart = [torch.linalg.matrix_norm(gram - eye) for gram in (t["Q"] @ t["Q"].T, t["P"].T @ t["P"])]
    return p["orth"] * (apart[0] + apart[1]) / (2 * p["sites"])
