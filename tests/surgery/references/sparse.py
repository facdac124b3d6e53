"""Methods that keep the zeros of W."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Parameters = dict[str, Any]


def lors(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """The released backward: neither the mask nor the scale is in the gradient."""
    product = t["A"] @ t["B"]
    value = (W != 0) * (p["alpha"] / p["rank"] ** 0.5 * product)
    return W + product + (value - product).detach()


def lors_exact(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + (W != 0) * (p["alpha"] / p["rank"] ** 0.5 * t["A"] @ t["B"])


def sqft(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + (W != 0) * (p["alpha"] / p["rank"] * t["B"] @ t["A"])


def spp(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """Each row of A stands for the next out / rank rows of W; B scales whole rows."""
    repeated = t["A"].repeat_interleave(W.shape[0] // p["rank"], dim=0)
    scale = p["alpha"] / p["rank"]
    return W * (1 + scale * repeated * t["B"].reshape(-1, 1))


def sbora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """Chosen columns of W gain those of B."""
    chosen = t["A"].argmax(dim=1)
    assert len(set(chosen.tolist())) == p["rank"] and torch.equal(t["A"].sum(dim=1), torch.ones(p["rank"]).to(W))
    return W.index_add(1, chosen, p["alpha"] / p["rank"] * t["B"])
