"""The loss in chunks against whole logits, eager and compiled: milliseconds and peak memory, forward and backward.

    python -m tests.benchmarks.kernels.loss

8192 tokens of width 2048, bfloat16, a frozen head. Measured on an H200 with torch 2.11, time and peak:

    columns    chunks of 256 MiB    whole            whole, compiled    liger-kernel     the products alone
    32000      3.4 ms, 0.40 GiB     5.9 ms, 2.9      3.6 ms, 0.52       4.0 ms, 0.06     2.9 ms
    128256     15.6 ms, 0.40 GiB    24.0 ms, 11.7    15.2 ms, 1.99      16.3 ms, 0.09    11.6 ms

Since then a chunk's tensors no longer wait for the next one's: 0.28 GiB is predicted, in the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from surgery.compiler.kernels.chunked_loss import chunked_loss, chunked_loss_reference

TOKENS, WIDTH, GIB = 8192, 2048, 2**30
Head = Callable[[dict[str, Tensor], Tensor], Tensor]


def linear(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Logits of rows."""
    return functional.linear(hidden, weights["head"])


def capped(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Logits of rows with a soft cap, as Gemma has it."""
    return torch.tanh(linear(weights, hidden) / 30.0) * 30.0


def measured(run: Callable[[], Any]) -> str:
    """Time and peak memory over what is there already."""
    from triton.testing import do_bench

    time = do_bench(run, warmup=10, rep=60, return_mode="median")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    peak = (torch.cuda.max_memory_allocated() - before) / GIB
    return f"{time:8.2f} ms {peak:8.2f} GiB"


def report(vocabulary: int, head: Head, trained: bool) -> None:
    """Every form at one size."""
    weights = {"head": (torch.randn(vocabulary, WIDTH, device="cuda") * 0.02).bfloat16().requires_grad_(trained)}
    hidden = torch.randn(4, TOKENS // 4, WIDTH, device="cuda").bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary, (4, TOKENS // 4), device="cuda")
    count = torch.tensor(TOKENS, device="cuda")
    wanted = [hidden, *(weight for weight in weights.values() if trained)]

    def gradients(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), wanted)

    def whole() -> Tensor:
        return chunked_loss_reference(head, weights, hidden, targets, count)

    compiled = torch.compile(head, dynamic=True)
    forms: dict[str, Callable[[], Tensor]] = {"whole": whole, "whole, compiled": torch.compile(whole, dynamic=True)}

    def chunked(rows: int) -> Tensor:
        return chunked_loss(head if head is linear else compiled, weights, hidden, targets, count, rows)

    for mebibytes in (128, 256, 512, 1024):
        rows = mebibytes * 2**20 // (4 * vocabulary)
        forms[f"chunks of {mebibytes} MiB ({rows} rows)"] = partial(chunked, rows)
    print(f"--- {vocabulary} columns, {head.__name__}, {'trained' if trained else 'frozen'}")
    for name, form in forms.items():
        print(f"{name:32s}{measured(gradients(form))}", flush=True)
        torch.cuda.empty_cache()


def main() -> None:
    """All sizes."""
    report(32000, linear, trained=False)
    report(128256, linear, trained=False)
    report(32000, capped, trained=False)
    report(32000, linear, trained=True)


if __name__ == "__main__":
    main()
