"""Functions of a module's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Parameters = dict[str, Any]
Output = Callable[[Tensor, Tensor], Tensor]


def _gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.erf(x / 2**0.5))


def hadamard(W: Tensor, t: Tensors, p: Parameters) -> Output:
    return lambda x, y: t["w"] * y + t["b"]


def surm_adapter(W: Tensor, t: Tensors, p: Parameters) -> Output:
    v, n = t["a"] * t["b"], len(t["a"])
    matrix = torch.stack([v.roll(j) for j in range(n)], dim=1)  # column j is the first one moved down by j
    return lambda x, y: y + _gelu(y @ matrix.T) + t["c"]


def adapter(W: Tensor, t: Tensors, p: Parameters) -> Output:
    return lambda x, y: y + _gelu(y @ t["D"].T + t["d"]) @ t["U"].T + t["u"]
