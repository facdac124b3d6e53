"""Methods that keep the zeros of W."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Parameters = dict[str, Any]


def lors(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """The released backward has neither the mask nor the scale in the gradient."""
    product = t["A"] @ t["B"]
    value = (W != 0) * (p["alpha"] / p["rank"] ** 0.5 * product)
    return W + (value if p["exact"] else product + (value - product).detach())


def sqft(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + (W != 0) * (p["alpha"] / p["rank"] * t["B"] @ t["A"])


def spp(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """Each row of A stands for the next out / rank rows of W; B scales whole rows."""
    height = W.shape[0] // p["rank"]
    rows = [t["A"][i // height] * t["B"].flatten()[i] for i in range(W.shape[0])]
    return W * (1 + p["alpha"] / p["rank"] * torch.stack(rows))


def sbora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """Chosen columns of W gain those of B."""
    chosen = t["A"].argmax(dim=1)
    assert len(set(chosen.tolist())) == p["rank"] and torch.equal(t["A"].sum(dim=1), torch.ones(p["rank"]).to(W))
    return W.index_add(1, chosen, p["alpha"] / p["rank"] * t["B"])


def sbora_fb(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """Chosen rows of W gain those of A."""
    chosen = t["B"].argmax(dim=1)
    assert len(set(chosen.tolist())) == p["rank"] and torch.equal(t["B"].sum(dim=1), torch.ones(p["rank"]).to(W))
    return W.index_add(0, chosen, p["alpha"] / p["rank"] * t["A"])
