"""The starts that are drawn or filled: every draw is on the CPU in float32, from the generator that it is given."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Sizes = tuple[int, ...]


def _uniform(shape: Sizes, bound: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def _normal(shape: Sizes, std: float, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * std


def _kaiming_uniform(shape: Sizes, numbers: list[float], generator: torch.Generator) -> Tensor:
    """U(+-1 / sqrt(fan_in)); with a number, U(+-sqrt(6 / ((1 + a^2) fan_in))) as in torch. fan_in is the last axis."""
    bound = math.sqrt(6 / ((1 + numbers[0] ** 2) * shape[-1])) if numbers else 1 / math.sqrt(shape[-1])
    return _uniform(shape, bound, generator)


def _xavier(shape: Sizes, numbers: list[float], generator: torch.Generator) -> Tensor:
    """U(+-sqrt(6 / (fan_in + fan_out))), the last two axes."""
    outputs = shape[-2] if len(shape) > 1 else 1
    return _uniform(shape, math.sqrt(6 / (shape[-1] + outputs)), generator)


def _orthogonal(shape: Sizes, numbers: list[float], generator: torch.Generator) -> Tensor:
    """Orthonormal rows, or columns where there are fewer of them."""
    rows, columns = shape[-2:]
    tall = (*shape[:-2], max(rows, columns), min(rows, columns))
    q, r = torch.linalg.qr(torch.randn(tall, generator=generator))
    q *= torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)  # uniform over all of them
    found: Tensor = q if rows >= columns else q.transpose(-1, -2)
    return found.contiguous()


def _eye(shape: Sizes, numbers: list[float], generator: torch.Generator) -> Tensor:
    return torch.eye(shape[-2], shape[-1]).expand(shape).contiguous()


def _choice(shape: Sizes, numbers: list[float], generator: torch.Generator) -> Tensor:
    """Distinct whole numbers of 0..n-1 in random order, int64."""
    return torch.randperm(int(numbers[0]), generator=generator)[: math.prod(shape)].reshape(shape)


def _onehot_rows(shape: Sizes, numbers: list[float], generator: torch.Generator) -> Tensor:
    """Distinct rows of the identity matrix in random order; each leading index has its own."""
    *leading, rows, columns = shape
    picked = [torch.randperm(columns, generator=generator)[:rows] for _ in range(math.prod(leading))]
    return torch.nn.functional.one_hot(torch.stack(picked), columns).float().reshape(shape)


DRAWS: dict[str, Callable[[Sizes, list[float], torch.Generator], Tensor]] = {
    "zeros": lambda shape, numbers, generator: torch.zeros(shape),
    "ones": lambda shape, numbers, generator: torch.ones(shape),
    "eye": _eye,
    "constant": lambda shape, numbers, generator: torch.full(shape, numbers[0]),
    "normal": lambda shape, numbers, generator: _normal(shape, numbers[0], generator),
    "uniform": lambda shape, numbers, generator: _uniform(shape, numbers[0], generator),
    "kaiming_uniform": _kaiming_uniform,
    "kaiming_normal": lambda shape, numbers, generator: _normal(shape, math.sqrt(2 / shape[-1]), generator),
    "xavier": _xavier,
    "orthogonal": _orthogonal,
    "onehot_rows": _onehot_rows,
    "choice": _choice,
    "key": lambda shape, numbers, generator: torch.randint(2**62, shape, generator=generator),
    "clock": lambda shape, numbers, generator: torch.zeros(shape),
}


def draw(name: str, shape: Sizes, numbers: list[float], generator: torch.Generator) -> Tensor:
    """A tensor of the start `name`, float32 (int64 for positions)."""
    return DRAWS[name](shape, numbers, generator)


def seed_of(seed: int, name: str) -> int:
    """The seed of the draws of a tensor: a run's and its name, so that they depend on nothing else."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def drawn(name: str, shape: Sizes, axes: int, numbers: list[float], generator: torch.Generator) -> Tensor:
    """A tensor of the start `name` whose own shape is the last `axes` ones: what leads has draws of its own."""
    leading, own = shape[: len(shape) - axes], shape[len(shape) - axes :]
    draws = [draw(name, own, numbers, generator) for _ in range(math.prod(leading))]
    return torch.stack(draws).reshape(shape)


@torch.no_grad()
def redraw(
    weights: Mapping[str, Tensor], optimizer: Any, names: Sequence[str], start: str, numbers: list[float], axes: int,
    seed: int, step: int,
) -> None:  # fmt: skip
    """Begin tensors anew, by draws from (seed, name, step), and forget what the optimizer knew of them."""
    for name in names:
        tensor = weights[name]
        generator = torch.Generator().manual_seed(seed_of(seed, f"{name} {step}"))
        value = drawn(start, tuple(tensor.shape), axes, numbers, generator).to(tensor.dtype)
        tensor.copy_(value.pin_memory() if tensor.is_cuda else value, non_blocking=True)
    forget(optimizer, [weights[name] for name in names])


def forget(optimizer: Any, tensors: Sequence[Tensor]) -> None:
    """Let an optimizer begin anew with some tensors: it then knows as little of them as before its first step."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's is around another
    if hasattr(optimizer, "forget"):
        optimizer.forget(tensors)
        return
    for tensor in tensors:
        if isinstance(optimizer, torch.optim.Adam | torch.optim.SGD):  # fused ones want moments of all or of none
            for value in optimizer.state.get(tensor, {}).values():
                if isinstance(value, Tensor):
                    value.zero_()
        else:
            optimizer.state.pop(tensor, None)
