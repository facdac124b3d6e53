"""The update of all weights of a Llama of width 2048 with 16 layers (112 matrices, 973M numbers), on one GPU.

    python -m tests.benchmarks.kernels.moved

Under a minute. Predicted on an H200, as a multiple of the time in which the weights are copied (0.92 ms in bfloat16):
1.05 to 1.2 for 64 x 128 tiles, where A is read from the L2 cache once per 64 rows of W, as many bytes as W's own in
bfloat16; 1.02 to 1.1 for 128 rows. float32: 1.03 to 1.1 either way. `cat` and `addmm_` per weight was measured at
6.9 in bfloat16. Keeping the factors: 0.5 ms by clones, 0.02 by one foreach copy. AdamW with stochastic rounding: 0.3 ms
over 11M numbers, where torch's fused one takes 0.05.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from surgery.compiler.kernels import moved_weights
from surgery.optimizers.adamw import RoundingAdamW

LAYER = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
LAYERS, RANK, SCALE = 16, 16, 2.0
Job = tuple[torch.dtype, tuple[int, int, int, int, int, str]]  # dtype of W; Tiles
JOBS: list[Job] = [
    *((torch.bfloat16, (*cut, "tf32")) for cut in (
        (64, 128, 2048, 4, 1), (128, 128, 512, 8, 1), (128, 64, 2048, 4, 1), (128, 64, 2048, 8, 1),
        (128, 64, 512, 4, 1), (128, 64, 256, 4, 1), (64, 64, 512, 4, 1),
        (256, 64, 2048, 8, 1), (256, 32, 2048, 8, 1), (128, 32, 2048, 4, 1), (64, 64, 2048, 4, 1), (64, 64, 2048, 2, 1),
        (32, 128, 2048, 4, 1), (32, 128, 512, 4, 1), (16, 256, 2048, 4, 1),
    )),
    (torch.bfloat16, (128, 64, 2048, 4, 1, "bf16x3")),
    *((torch.float32, (*cut, "tf32x3")) for cut in (
        (64, 128, 2048, 4, 1), (64, 128, 512, 4, 1), (128, 64, 2048, 8, 1), (64, 64, 2048, 4, 1), (32, 128, 2048, 4, 1),
    )),
    (torch.float32, (64, 128, 2048, 4, 1, "bf16x3")),
]  # fmt: skip


def compiled(job: Job) -> str:
    """Compile one form into Triton's cache; gives what went wrong."""
    from surgery.compiler.kernels import moved_weights_triton as grouped

    dtype, tiles = job
    left, right = torch.zeros(512, RANK, device="cuda"), torch.zeros(RANK, 512, device="cuda")
    target = torch.zeros(512, 512, device="cuda", dtype=dtype)
    try:
        before = ([left.clone()], [right.clone()])
        grouped.add_products([target], [left], [right], SCALE, before, [target], False, grouped.Tiles(*tiles))
        torch.cuda.synchronize()
    except Exception as error:  # one form that does not fit the card must not end the table
        return f"{type(error).__name__}: {str(error)[:60]}"
    return ""


def milliseconds(function: Callable[..., object], *arguments: Any) -> float:
    """The median time of a call."""
    from triton.testing import do_bench

    found: float = do_bench(partial(function, *arguments), warmup=10, rep=40, return_mode="median")
    return found


def factors() -> tuple[list[Tensor], list[Tensor]]:
    """B and A of every weight."""
    shapes = LAYER * LAYERS
    return (
        [torch.randn(rows, RANK, device="cuda") * 0.02 for rows, _ in shapes],
        [torch.randn(RANK, columns, device="cuda") * 0.02 for _, columns in shapes],
    )


def cloned(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each, one by one."""
    return [tensor.clone() for tensor in tensors]


def main() -> None:
    """Print the tables."""
    from surgery.compiler.kernels import moved_weights_triton as grouped

    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = {job: reason for job, reason in zip(JOBS, pool.map(compiled, JOBS), strict=True) if reason}
    print("does not compile:", failed)
    (lefts, rights), before = factors(), factors()
    for dtype, jobs in itertools.groupby(JOBS, key=lambda job: job[0]):
        weights = [torch.randn(shape, device="cuda").to(dtype) for shape in LAYER * LAYERS]
        sources = [weight.clone() for weight in weights]
        copied = milliseconds(torch._foreach_copy_, weights, sources)
        flat = torch.empty(2, sum(map(Tensor.numel, weights)), device="cuda", dtype=dtype)
        floor = milliseconds(flat[0].copy_, flat[1])
        del flat
        print(f"{dtype}: copy {floor:.3f} ms, foreach copy {copied / floor:.3f} of it")
        for _, tiles in (job for job in jobs if job not in failed):
            found = []
            for start in (weights, sources):
                given = (weights, lefts, rights, SCALE, before, start, False)
                grouped.add_products(*given, grouped.Tiles(*tiles))  # its tables stay for the calls below
                found.append(milliseconds(grouped.add_products, *given) / floor)
            print(f"  {'/'.join(map(str, tiles))}: in place {found[0]:.3f}, from the start {found[1]:.3f}")
        began = time.perf_counter()
        for _ in range(20):
            moved_weights.add_products(weights, lefts, rights, SCALE, before=before, sources=sources)
        print(f"  host {(time.perf_counter() - began) / 20 * 1e3:.3f} ms per call")
        torch.cuda.synchronize()
        del weights, sources
    trained = [*lefts, *rights]
    kept = [torch.empty_like(tensor) for tensor in trained]
    clones, together = milliseconds(cloned, trained), milliseconds(torch._foreach_copy_, kept, trained)
    print(f"keeping: clones {clones:.3f} ms, foreach {together:.3f} ms")
    for dtype, make in ((torch.float32, torch.optim.AdamW), (torch.bfloat16, torch.optim.AdamW),
                        (torch.bfloat16, RoundingAdamW)):  # fmt: skip
        parameters = [tensor.to(dtype, copy=True).requires_grad_() for tensor in trained]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 1e-3
        optimizer = make(parameters, lr=1e-3, **({"fused": True} if make is torch.optim.AdamW else {}))  # type: ignore[arg-type]
        optimizer.step()
        print(f"{make.__name__} in {dtype}: {milliseconds(optimizer.step):.3f} ms")


if __name__ == "__main__":
    main()
