"""Attention: repeated keys against shared ones, and documents packed into rows; milliseconds, forward and backward.

    python -m tests.benchmarks.kernels.attention

Measured on an H200 with torch 2.11, half precision, 16 heads on 4: torch takes cuDNN's kernel both ways, and shared
keys save 12 to 17 % of a causal attention (2 x 2048 tokens, heads of 64: 0.28 to 0.24; of 128: 0.42 to 0.35; of 256:
0.86 to 0.74). In float32 they make it fall from the memory-efficient kernel to the plain product: 2.31 to 4.96.

Packed rows of 4 x 2048 tokens, 32 heads of 64 on 8: a dense mask 2.11, causal over whole rows 0.76, torch's varlen
flash 0.70 where 16 documents are allowed for, 1.40 with 256, 8.0 with 2048: each document that might be costs 4 us, so
their number would have to be known on the host. Predicted for flex attention, which needs no such number, and not
measured: 1.1 with one document a row, 0.7 with 4, 0.55 with 16; 10 s for its first call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from surgery.compiler.kernels.packed_attention import document_starts, packed_attention, packed_attention_reference


def inputs(dtype: torch.dtype, rows: int, heads: int, groups: int, length: int, size: int) -> list[Tensor]:
    """Query, key and value as a projection gives them."""
    return [
        torch.randn(rows, length, count, size, device="cuda", dtype=dtype).transpose(1, 2).detach().requires_grad_()
        for count in (heads, groups, groups)
    ]


def milliseconds(attend: Callable[[], Tensor], given: list[Tensor]) -> float:
    """Forward and backward."""
    from triton.testing import do_bench

    gradient = torch.randn_like(given[0])
    found: Any = do_bench(
        lambda: torch.autograd.grad(attend(), given, gradient), warmup=5, rep=30, return_mode="median"
    )
    return float(found)


def shared_keys() -> None:
    """What `enable_gqa` is worth."""
    for dtype in (torch.bfloat16, torch.float32):
        for size in (64, 128, 256):
            query, key, value = given = inputs(dtype, 2, 16, 4, 2048, size)

            def attend(shared: bool, query: Tensor = query, key: Tensor = key, value: Tensor = value) -> Tensor:
                if not shared:
                    key, value = key.repeat_interleave(4, 1), value.repeat_interleave(4, 1)
                return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared)

            times = [milliseconds(lambda shared=shared: attend(shared), given) for shared in (False, True)]  # type: ignore[misc]
            print(f"{dtype} heads of {size}: repeated {times[0]:.2f}, shared {times[1]:.2f}", flush=True)


def documents(rows: int, length: int) -> None:
    """Rows of several documents."""
    query, key, value = given = inputs(torch.bfloat16, rows, 32, 8, length, 64)
    for count in (1, 4, 16, 64):
        cuts = torch.randperm(length - 1)[: count - 1] + 1
        positions = (
            torch.arange(length) - torch.zeros(length, dtype=torch.int64).scatter_(0, cuts, cuts).cummax(0).values
        )
        starts = document_starts(positions.expand(rows, length).cuda())
        before = time.perf_counter()
        packed_attention(query, key, value, starts)
        torch.cuda.synchronize()
        first = time.perf_counter() - before
        flex = milliseconds(lambda starts=starts: packed_attention(query, key, value, starts), given)  # type: ignore[misc]
        dense = milliseconds(lambda starts=starts: packed_attention_reference(query, key, value, starts), given)  # type: ignore[misc]
        print(
            f"{rows} x {length}, {count} documents: flex {flex:.2f} (first {first:.1f} s), dense mask {dense:.2f}",
            flush=True,
        )


def main() -> None:
    """Both tables."""
    shared_keys()
    documents(4, 2048)
    documents(1, 8192)


if __name__ == "__main__":
    main()
