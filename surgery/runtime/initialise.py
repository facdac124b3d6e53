"""Plan + weights -> Tensors: the start of every tensor of every site, the same on any device and in any order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from surgery.compiler.algebra.base import logical
from surgery.compiler.algebra.evaluate import evaluate
from surgery.compiler.algebra.formula import TensorFormula
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.quantity import value_of, whole_of
from surgery.compiler.plan import Plan, Site, TensorPlan


def initialise(plan: Plan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The method's tensors by key, in their dtypes, on the device of the site's W; `weights` has W by its name.

    Every draw is on the CPU in float32 from a generator seeded by (seed, path, name), so it depends on nothing else.
    """
    tensors: dict[str, Tensor] = {}
    for site in plan.sites:
        formulas = {tensor.name: tensor for tensor in instance(plan, site.formula).tensors}
        for tensor in site.tensors:
            if tensor.key not in tensors:
                tensors[tensor.key] = _start(plan, site, tensor, formulas[tensor.name], weights[site.parameter])
    return tensors


def _start(plan: Plan, site: Site, tensor: TensorPlan, formula: TensorFormula, stored: Tensor) -> Tensor:
    dtype = getattr(torch, tensor.dtype)
    start = formula.start
    if start.expression is not None:
        base = logical(stored.detach(), site)
        return evaluate(start.expression, base, {}).to(dtype).expand(tensor.shape).clone()
    generator = torch.Generator().manual_seed(_seed(plan.step.seed, tensor.key))
    numbers = [float(value_of(number)) for number in start.arguments]
    value = STARTS[start.name](tuple(whole_of(size) for size in formula.shape), numbers, generator)
    return value.to(device=stored.device, dtype=dtype)


def _seed(seed: int, key: str) -> int:
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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


STARTS: dict[str, Callable[[Sizes, list[float], torch.Generator], Tensor]] = {
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
}
