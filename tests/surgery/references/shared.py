"""Tensors that several sites share, and shortcuts between blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Parameters = dict[str, Any]


def condlora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    A, B = t["TA"] @ W, W @ t["TB"]
    return W + p["alpha"] / p["rank"] * B @ A


def _heads(t: Tensors, p: Parameters) -> list[Tensor]:
    """Per head `[head_dim, in or out]`."""
    core = t["CL"][p["layer"]] * t["CM"][p["slot"]]
    return [(t["B"] * t["CH"][h] * core) @ t["A"].T for h in range(p["heads"])]


def lorta(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / p["rank"] * torch.cat(_heads(t, p), dim=0)


def lorta_out(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    return W + p["alpha"] / p["rank"] * torch.cat([head.T for head in _heads(t, p)], dim=1)


def aurora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    for q in range(p["rank"]):
        W = W + t["lam"][q] * t["P"][p["site"], q] * torch.outer(t["V"][:, q], t["U"][q])
    return W


def reslora(W: Tensor, t: Tensors, p: Parameters) -> Tensor:
    """The block shortcut."""
    change = t["B"] @ t["A"]
    for earlier in p["earlier"][: p["shortcuts"]]:
        change = change + earlier["t"]["B"] @ earlier["t"]["A"]
    return W + p["alpha"] / p["rank"] * change


def reslora_input(W: Tensor, t: Tensors, p: Parameters) -> Callable[[Tensor, Tensor], Tensor]:
    """The input shortcut: one earlier input is added."""

    def output(x: Tensor, y: Tensor) -> Tensor:
        total = x + p["earlier"][0]["x"] if p["earlier"] else x
        return y + p["alpha"] / p["rank"] * (total @ t["A"].T) @ t["B"].T

    return output


def reslora_middle(W: Tensor, t: Tensors, p: Parameters) -> Callable[[Tensor, Tensor], Tensor]:
    """The middle shortcut: between the two factors."""

    def output(x: Tensor, y: Tensor) -> Tensor:
        inner = x @ t["A"].T
        for earlier in p["earlier"][: p["shortcuts"]]:
            inner = inner + earlier["x"] @ earlier["t"]["A"].T
        return y + p["alpha"] / p["rank"] * inner @ t["B"].T

    return output
