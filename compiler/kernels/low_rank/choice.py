"""Which form of a low-rank linear's products runs: a model of their times by their shapes, in microseconds.

Its numbers are fits to single products timed on one H200 (torch 2.11, Triton 3.6, bfloat16, 8192 rows, rank 16, widths
512 to 8192; tests/compiler/kernels/test_choice.py has them), with the product with left or right after the wide one.
As a step of one loop over all sites, the way `product` runs it, it is right on that card and not timed there yet: what
the model says of several sites in one launch is a prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from surgery.compiler.kernels import forms
from surgery.compiler.kernels.forms import HALF, by_row, ceil_div, processors
from surgery.compiler.kernels.low_rank import narrow, plain
from surgery.compiler.kernels.low_rank.product import MOST_SITES, Tiling, fits

STEP = {Tiling(128, 256): 0.74, Tiling(128, 128, 64, 4, 8, 8, False): 0.41}
"""What one step of a tile's loop takes, and with it all tiles that run at a time."""
START = 8.0  # what a Triton product takes beside its steps
OPERATION = 6.0  # and one of torch's beside its numbers and bytes
NUMBERS = 380e6  # products of two numbers in a microsecond
WRITTEN, READ = 3.3e6, 5e6  # bytes of a sum in a microsecond: written by a narrow product, read again by a wide one

LAUNCH = 40.0
"""How long a Triton product has to run: Python takes about as long to launch one (50 to 90, without a device, on a slow
processor), and a program that is faster there than here waits for it."""


FEW = 32
"""Up to so many columns a narrow pass is Triton's. Of rank 16 it takes 11 us where torch's product takes 12, both
gradients 17 and 30 (three sites at once 21 and 55), the gradient to the right as long as torch's; from rank 48 on
torch's are quicker, except where a rank is no multiple of eight (rank 4: 11 and 21; 23 and 39; 17 and 21)."""


def tiling_of_outputs(rows: Tensor, weights: Sequence[Tensor], ranks: Sequence[int]) -> Tiling | None:
    """How Triton makes `rows @ weight.T + u @ left.T` of all sites; None where torch's products are to make them."""
    if not _bulk([rows], weights):
        return None
    outs, count = tuple(weight.shape[0] for weight in weights), processors(rows.device)
    return fastest_for_outputs(rows.shape[0], rows.shape[1], outs, tuple(ranks), count)


def tiling_of_input_gradient(dys: Sequence[Tensor], weights: Sequence[Tensor], rank: int) -> Tiling | None:
    """How Triton makes the sum of all sites' `dy @ weight` and of `du @ right`; None where torch's products do."""
    if not _bulk(dys, weights):
        return None
    (rows, _), width, outs = dys[0].shape, weights[0].shape[1], tuple(dy.shape[1] for dy in dys)
    return fastest_for_input_gradient(rows, width, outs, rank, processors(dys[0].device))


def narrow_product(rows: Tensor, ranks: int) -> Any:
    """The module whose `narrow_product` is taken for `ranks` columns on the narrow side."""
    return narrow if _reads_in_triton(rows, ranks) and (ranks <= FEW or ranks % 8) else plain


def narrow_gradients(dy: Tensor, rank: int) -> Any:
    """The module whose `narrow_gradients` is taken for a rank of each site."""
    return narrow if _reads_in_triton(dy, rank) and (rank <= FEW or rank % 8) else plain


def right_gradients(rows: Tensor, ranks: int) -> Any:
    """The module whose `right_gradients` is taken for `ranks` columns on the narrow side."""
    return narrow if _reads_in_triton(rows, ranks) and ranks % 8 else plain


def _reads_in_triton(wide: Tensor, ranks: int) -> bool:
    return forms.in_triton(wide) and _is_half_on_gpu(wide) and wide.shape[0] > 0 and ranks <= narrow.WIDEST


@lru_cache(4096)
def fastest_for_outputs(
    rows: int, width: int, outs: tuple[int, ...], ranks: tuple[int, ...], count: int
) -> Tiling | None:
    """The tiling for x `[rows, width]`, weights `[out, width]` and `count` multiprocessors, None if torch is faster."""
    torch_time = 0.0
    for out, rank in zip(outs, ranks, strict=True):
        size = rows * out * 2
        torch_time += time_of_torch(rows, rank, out) + size / WRITTEN + time_of_torch(rows, width, out) + size / READ
    times = {tiling: time_of_triton(tiling, rows, outs, [width, max(ranks)], count) for tiling in STEP}
    return _fastest(times, torch_time)


@lru_cache(4096)
def fastest_for_input_gradient(rows: int, width: int, outs: tuple[int, ...], rank: int, count: int) -> Tiling | None:
    """The tiling for dys `[rows, out]` and weights `[out, width]` on `count` multiprocessors, None if torch is faster.

    `rank` is the sum of the ranks whose product goes into the same sum; zero where there is none.
    """
    sums = len(outs) if rank else len(outs) - 1  # products of torch that read what the one before has written
    torch_time = sum(time_of_torch(rows, out, width) for out in outs) + sums * rows * width * 2 / READ
    torch_time += time_of_torch(rows, rank, width) + rows * width * 2 / WRITTEN if rank else 0.0
    times = {tiling: time_of_triton(tiling, rows, [width], [*outs, rank], count) for tiling in STEP}
    return _fastest(times, torch_time)


def time_of_triton(tiling: Tiling, rows: int, columns: Sequence[int], depths: Sequence[int], count: int) -> float:
    """One launch that makes all `columns` by walking through all `depths`."""
    tiles = ceil_div(rows, tiling.rows) * sum(ceil_div(width, tiling.columns) for width in columns)
    steps = sum(ceil_div(depth, tiling.depth) for depth in depths)
    return START + ceil_div(tiles, count) * steps * STEP[tiling]


def time_of_torch(rows: int, depth: int, columns: int) -> float:
    """One product of torch, without reading what it adds to."""
    return OPERATION + rows * depth * columns / NUMBERS


def _fastest(times: dict[Tiling, float], torch_time: float) -> Tiling | None:
    best = min(times, key=times.__getitem__)
    return best if LAUNCH <= times[best] < torch_time else None


def _bulk(wides: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether bulk tensor copies take the operands and what is made of them."""
    matrices = [*wides, *weights]
    return (
        all(map(_is_half_on_gpu, matrices))
        and wides[0].shape[0] > 0
        and len({matrix.dtype for matrix in matrices}) == 1
        and len(weights) <= MOST_SITES
        and len({by_row(weight) for weight in weights}) == 1
        and all(by_row(wide) for wide in wides)
        and all(size % 8 == 0 for weight in weights for size in weight.shape)
        and fits(*matrices)
    )


def _is_half_on_gpu(matrix: Tensor) -> bool:
    return matrix.is_cuda and matrix.dtype in HALF and _is_hopper(matrix.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    # later cards have them too, but other times
    return forms.HAS_TRITON and torch.cuda.get_device_capability(device) == (9, 0)
