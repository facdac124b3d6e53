"""The products of a low-rank linear at the shapes of a Llama layer, on one GPU.

    python -m tests.benchmarks.kernels.product

Under a minute. Predicted on an H200 (8192 tokens of bfloat16, rank 16; the model of choice.py): the outputs of queries,
keys and values in one launch 155 us, where the frozen products take 150 and torch's low-rank form 196; their input
gradient 153, where frozen 180 and torch's form 190 to 210; one 2048 x 2048 site 106 both ways, torch's form 119; gate
and up 789 and 769 (torch 883 and 765); down 390 and 399 (405 and 441). Rank 64 costs as much as rank 16, rank 256 three
steps of 33 more (9 %). A launch keeps the host for 50 to 90 us; casting the factors takes two launches a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from math import sqrt
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from surgery.compiler.kernels.low_rank import choice, low_rank_linear, plain, product
from surgery.compiler.kernels.low_rank import narrow as fused
from surgery.compiler.kernels.low_rank.product import Tiling

TOKENS, RANK = 8192, 16
GROUPS = [
    (2048, [2048, 512, 512]), (2048, [2048]), (2048, [8192, 8192]), (8192, [2048]), (4096, [4096]), (1024, [1024]),
]  # fmt: skip
OTHERS = [Tiling(128, 128, 64, 3, 4, 8, True, 2), Tiling(256, 128)]  # tried where there is one site


@dataclass(frozen=True)
class Group:
    """The operands of sites that read one x, in bfloat16; the factors as masters in float32."""

    x: Tensor
    weights: list[Tensor]
    dys: list[Tensor]
    lefts: list[Tensor]
    rights: list[Tensor]
    u: Tensor

    @classmethod
    def drawn(cls, tokens: int, width: int, outs: list[int], rank: int) -> Group:
        def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return (torch.randn(size, device="cuda") / sqrt(size[-1])).to(dtype)

        return cls(
            random(tokens, width), [random(out, width) for out in outs], [random(tokens, out) for out in outs],
            [random(out, rank, dtype=torch.float32) for out in outs],
            [random(rank, width, dtype=torch.float32) for _ in outs], random(tokens, rank * len(outs)),
        )  # fmt: skip

    @property
    def biases(self) -> list[None]:
        return [None] * len(self.weights)

    def frozen_outputs(self) -> list[Tensor]:
        return [self.x @ weight.T for weight in self.weights]

    def frozen_gradient(self) -> Tensor:
        total: Tensor = reduce(torch.add, (dy @ weight for dy, weight in zip(self.dys, self.weights, strict=True)))
        return total

    def outputs(self, tiling: Tiling | None) -> list[Tensor]:
        operands = (self.x, self.u, self.weights, self.biases, self.lefts)
        return plain.outputs(*operands) if tiling is None else product.outputs(*operands, tiling)

    def gradient(self, tiling: Tiling | None) -> Tensor:
        operands = (self.dys, self.weights, self.u, self.rights)
        return plain.input_gradient(*operands) if tiling is None else product.input_gradient(*operands, tiling)

    def error(self, tiling: Tiling | None) -> float:
        """The largest relative difference to float64."""
        parts = self.u.double().chunk(len(self.weights), 1)
        lefts = [left.bfloat16().double() for left in self.lefts]
        pairs = [
            (y, self.x.double() @ weight.double().T + part @ left.T)
            for y, weight, part, left in zip(self.outputs(tiling), self.weights, parts, lefts, strict=True)
        ]
        wide = sum(dy.double() @ weight.double() for dy, weight in zip(self.dys, self.weights, strict=True))
        right = torch.cat(self.rights).bfloat16().double()
        pairs.append((self.gradient(tiling), wide + self.u.double() @ right))
        return max(float((got.double() - want).norm() / want.norm()) for got, want in pairs)


def timed(function: Callable[[], Any]) -> float:
    """Microseconds on the device: the median of replays of its CUDA graph, with a cold cache."""
    from triton.testing import do_bench

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        function()
    median: float = do_bench(graph.replay, warmup=10, rep=40, return_mode="median")
    return median * 1e3


def on_the_host(function: Callable[[], Any]) -> float:
    """Microseconds that a call keeps Python, the device not waited for."""
    times = []
    for _ in range(100):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return sorted(times)[50] * 1e6


@contextmanager
def forms(wide: bool, narrow: bool) -> Iterator[None]:
    """Triton for all wide products, for the narrow passes; else torch."""

    def chosen(*sizes: Any) -> Tiling | None:
        return next(iter(choice.STEP)) if wide else None

    def reads(wide: Tensor, ranks: int) -> Any:
        return fused if narrow else plain

    with mock.patch.multiple(
        choice, fastest_for_outputs=chosen, fastest_for_input_gradient=chosen,
        narrow_product=reads, narrow_gradients=reads, right_gradients=reads,
    ):  # fmt: skip
        yield


def one_way_each(group: Group, tiling: Tiling | None) -> str:
    """The times of the outputs and of the input gradient, and how far both are from float64."""
    outputs, gradient = timed(lambda: group.outputs(tiling)), timed(lambda: group.gradient(tiling))
    return f"{outputs:.1f}, {gradient:.1f}, error {group.error(tiling):.0e}"


def both_ways(group: Group) -> str:
    """Forward and backward of the whole operation beside the frozen linears and the branch as it is usually written."""

    def leaves() -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x, *factors = (tensor.detach().requires_grad_() for tensor in (group.x, *group.lefts, *group.rights))
        return x, factors[: len(group.lefts)], factors[len(group.lefts) :]  # on the stream of the graph

    def frozen() -> None:
        x, _, _ = leaves()
        torch.autograd.grad([functional.linear(x, weight) for weight in group.weights], [x], group.dys)

    def branch() -> None:
        x, lefts, rights = leaves()
        ys = [
            functional.linear(x, weight) + (x @ right.bfloat16().T @ left.bfloat16().T) * 2.0
            for weight, left, right in zip(group.weights, lefts, rights, strict=True)
        ]
        torch.autograd.grad(ys, [x, *lefts, *rights], group.dys)

    def operation() -> None:
        x, lefts, rights = leaves()
        ys = low_rank_linear(x, group.weights, group.biases, lefts, rights, [2.0] * len(lefts))
        torch.autograd.grad(ys, [x, *lefts, *rights], group.dys)

    row = f"   both ways: frozen {timed(frozen):.0f}, branch {timed(branch):.0f}"
    for name, wide, narrow in (
        ("torch", False, False),
        ("wide", True, False),
        ("narrow", False, True),
        ("all", True, True),
    ):
        with forms(wide, narrow):
            row += f", {name} {timed(operation):.0f} (host {on_the_host(operation):.0f})"
    return row


def main() -> None:
    """Print a line for each form of each group."""
    print(__doc__.split("\n\n")[2])
    start = time.time()
    for width, outs in GROUPS:
        group = Group.drawn(TOKENS, width, outs, RANK)
        forward = choice.tiling_of_outputs(group.x, group.weights, [RANK] * len(outs))
        print(
            f"{width} -> {outs}: outputs, input gradient in us: frozen {timed(group.frozen_outputs):.1f}, "
            f"{timed(group.frozen_gradient):.1f}; chosen {forward}, "
            f"{choice.tiling_of_input_gradient(group.dys, group.weights, RANK * len(outs))}"
        )
        for tiling in (None, *choice.STEP, *(OTHERS if len(outs) == 1 else [])):
            print(f"   {tuple(tiling) if tiling else 'torch'}: {one_way_each(group, tiling)}", flush=True)
        if width == 2048:
            print(both_ways(group), flush=True)
    for rank in (1, 4, 64, 256):
        group = Group.drawn(TOKENS, 2048, [2048], rank)
        parts = {"torch": None, "Triton": next(iter(choice.STEP))}
        print(f"rank {rank}:", "; ".join(f"{name} {one_way_each(group, tiling)}" for name, tiling in parts.items()))
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
