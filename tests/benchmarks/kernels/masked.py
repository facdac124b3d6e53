"""Weights under their mask, norms by parts, columns times numbers; and eight layers of 4096, half of them zeros.

    python -m tests.benchmarks.kernels.masked

Under a minute. 8192 tokens, bfloat16, rank 16. Nothing of it has been measured; predicted on an H200, in microseconds:

    weight 4096 x 4096      kernel 17 to 20 (its bytes take 16), torch in place 75, by definition 150
    norms 2048 x 8192       kernel 12 to 20 (8), torch by three terms 35, of the formed matrix 150
    columns 8192 x 8192     kernels, both directions, 160 to 180 (158), torch 320, from float32 900

A frozen layer takes 740 forward and backward; with kernels and narrow passes a masked one 820 (1.11), as a layer with
LoRA (1.11 to 1.12); with torch's operations 1000 (1.36).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import surgery
from surgery.compiler.kernels import forms, row_norms, scaled_columns, updated_weight

TOKENS, WIDTH, LAYERS, RANK = 8192, 4096, 8, 16
RATE = 4.25e6  # bytes in a microsecond that a copy moves
SPEC = """
method released(rank: int = 16) {{
    A = train normal(0.01)[out, rank];  B = train orthogonal[rank, in]
    delta = surrogate(mask(W) * (4.0 * A @ B), A @ B)
}}
adapt layer.* {{ with {method} }}
step {{ optimizer = adamw(lr = 1e-4)  batch = 8192  steps = 8  loss = mse  compile = {mode} }}
"""


class Stack(nn.Module):
    """Linear layers with half of their weights zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(torch.rand_like(parameter) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, WIDTH]` to the same."""
        for layer in self.layer:
            x = layer(x)
        return x


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def alone(run: Callable[[], Any]) -> str:
    """Microseconds on the device, without what the host takes to launch."""
    from triton.testing import do_bench_cudagraph

    try:
        return f"{1e3 * do_bench_cudagraph(run, rep=20, return_mode='median'):.1f}"
    except Exception as error:  # one form that does not fit the card must not end the table
        return f"{type(error).__name__}: {str(error)[:40]}"


def weights() -> None:
    """`updated_weight` in its forms."""
    from surgery.compiler.kernels.updated_weight_triton import updated_weight as kernel

    weight = random(WIDTH, WIDTH) * (torch.rand(WIDTH, WIDTH, device="cuda") > 0.5)
    for dtype in (torch.float32, torch.bfloat16):
        left, right = random(WIDTH, RANK, dtype=dtype), random(RANK, WIDTH, dtype=dtype)
        given = (weight, left, right, 0.3, "mask")
        print(f"weight, factors {dtype}: bytes {4 * WIDTH * WIDTH / RATE:.1f}", end="  ")
        for tile in ((64, 128, 4), (32, 128, 4), (32, 256, 4), (64, 256, 8), (128, 128, 8), (64, 64, 4)):
            print(tile, alone(partial(kernel, *given, *tile)), end="  ")
        print("torch", alone(partial(updated_weight.in_place, *given)),
              "definition", alone(partial(updated_weight.updated_weight_reference, *given)), flush=True)  # fmt: skip


def norms() -> None:
    """Norms of rows in their forms."""
    from surgery.compiler.kernels.row_norms_triton import norms_and_product as kernel

    for outputs, inputs in ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)):
        weight = random(outputs, inputs)
        given = (weight, random(outputs, RANK, dtype=torch.float32), random(RANK, inputs, dtype=torch.float32), 2.0)
        print(f"norms {outputs} x {inputs}: bytes {2 * outputs * inputs / RATE:.1f}", end="  ")
        for tile in ((16, 128, 4, 3), (16, 64, 4, 4), (16, 256, 4, 3), (16, 128, 2, 4), (32, 128, 4, 3)):
            print(tile, alone(partial(kernel, *given, *tile)), end="  ")
        print("torch", alone(partial(row_norms.norms_and_product, *given)),
              "matrix", alone(partial(row_norms.updated_row_norms_reference, *given)), flush=True)  # fmt: skip


def columns() -> None:
    """Columns times numbers in their forms, forward and backward."""
    from surgery.compiler.kernels import scaled_columns_triton as kernels

    for width in (2048, 8192):
        y, dy, scales = random(TOKENS, width), random(TOKENS, width), random(width, dtype=torch.float32)
        print(f"columns {TOKENS} x {width}: bytes {10 * TOKENS * width / RATE:.1f}", end="  ")
        for name, module in (("kernels", kernels), ("torch", scaled_columns)):
            print(name, alone(partial(module.scaled, y, scales)),
                  alone(partial(module.scaled_and_sums, dy, y, scales)), end="  ")  # fmt: skip
        print(flush=True)


def layers() -> None:
    """Frozen, LoRA and masked layers through a step's own forward and backward, by torch's forms and by the kernels."""
    from triton.testing import do_bench

    with torch.device("cuda"):
        base = Stack().to(torch.bfloat16).requires_grad_(False)
    x, dy = random(TOKENS, WIDTH).requires_grad_(), random(TOKENS, WIDTH)

    def time(run: Callable[[Tensor], Tensor], trained: list[Tensor]) -> tuple[float, float]:
        def both() -> None:
            torch.autograd.grad(run(x), [x, *trained], dy)

        both()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        return do_bench(both, warmup=10, rep=60, return_mode="median"), peak

    frozen, peak = time(base, [])
    print(f"frozen {frozen:.3f} ms, {peak:.0f} MiB")
    for kernels in (True, False):
        for method in ("lora(rank = 16)", "released()", "sqft(rank = 16)"):
            program = surgery.parse(SPEC.format(method=method, mode="off"))
            step = surgery.compile(program, model=copy.deepcopy(base), example_inputs={"x": x.detach()}, device="cuda")
            trained = [value for site in step.parameters_by_site.values() for value in site.values()]
            with mock.patch.object(forms, "HAS_TRITON", kernels):
                found, peak = time(lambda x, step=step: step.module(x, True)[0], trained)  # type: ignore[misc]
            print(f"{method} {step.plan.sites[0].strategy}, kernels {kernels}: {found:.3f} ms, {found / frozen:.3f} of "
                  f"frozen, {peak:.0f} MiB", flush=True)  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    for part in (weights, norms, columns, layers):
        part()
