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


def gelora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["scale"] * t["B"] @ t["A"]


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


def sora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / p["rank"] * (t["B"] * t["g"]) @ t["A"]


def sora_penalty(t: Tensors, p: Parameters) -> Tensor:
    return p["l1"] / p["sites"] * t["g"].abs().mean()


def relora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / p["rank"] * t["B"] @ t["A"]  # as lora, between the steps that move W


def xgblora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] * torch.outer(t["B"][:, 0], t["A"][0])


def xgblora_penalty(t: Tensors, p: Parameters) -> Tensor:
    return p["decay"] * (t["A"].square().sum() + t["B"].square().sum())


def dora_dynamic(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    parts = [c * torch.outer(b, a) for c, b, a in zip(t["c"], t["B"].T, t["A"], strict=True)]
    return W + p["alpha"] / p["rank"] * torch.stack(parts).sum(0)


def dora_dynamic_penalty(t: Tensors, p: Parameters) -> Tensor:
    """Variances of all components' vectors, until the pruning ends; the first step is before that."""
    spread = [(a.var() + b.var()) / 2 for a, b in zip(t["A"], t["B"].T, strict=True)]
    return p["even"] * torch.stack(spread).mean() / p["sites"]


def lora2(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    inner = torch.diag(t["E"])
    return W + p["alpha"] / (p["rank"] + 1e-5) * t["Q2"] @ (t["P2"] @ inner @ t["Q1"]) @ t["P1"]


def lora2_penalty(t: Tensors, p: Parameters) -> Tensor:
    """The mean over all factors of how far each is from orthonormal, and the product of the two planes, without E."""
    grams = [t["P1"] @ t["P1"].T, t["Q1"] @ t["Q1"].T, t["P2"].T @ t["P2"], t["Q2"].T @ t["Q2"]]
    apart = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=torch.float64)) for gram in grams]
    across = torch.linalg.matrix_norm(t["Q2"] @ t["P2"] @ t["Q1"] @ t["P1"])
    return (p["orth"] * torch.stack(apart).mean() + p["cross"] * across) / p["sites"]


def delta_lora_scheduled(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / p["rank"] * t["B"] @ t["A"]  # as lora, beside the W that moves; the first ratio is 0


def flat_lora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / p["rank"] * t["B"] @ t["A"]  # the noise is 0 in evaluation, and in the first step


def rm_lora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / p["rank"] * t["B"] @ t["A"]


def rm_lora_penalty(t: Tensors, p: Parameters) -> Tensor:
    eye = torch.eye(p["rank"], dtype=torch.float64)
    apart = [(gram - eye).square().sum() for gram in (t["A"] @ t["A"].T, t["B"].T @ t["B"])]
    return p["orth"] * (apart[0] + apart[1])
