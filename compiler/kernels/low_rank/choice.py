"""Which form of a low-rank linear's products runs, by their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from surgery.compiler.kernels.low_rank.narrow import WIDEST
from surgery.compiler.kernels.low_rank.product import MOST_SITES, Tiling, by_row, ceil_div, fits, processors

TILINGS = (Tiling(128, 256), Tiling(128, 128, 64, 4, 8, 8, False))
FEWEST_ROWS = 512


def tiling_of_outputs(rows: Tensor, weights: Sequence[Tensor]) -> Tiling | None:
    """How Triton makes the outputs `rows @ weight.T + ...` of all sites; None where torch's products do."""
    if not _bulk([rows], weights):
        return None
    return _best(rows, [weight.shape[0] for weight in weights])


def tiling_of_input_gradient(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tiling | None:
    """How Triton sums `dy @ weight` over all sites; None where torch's products do."""
    if not _bulk(dys, weights):
        return None
    return _best(dys[0], [weights[0].shape[1]])


def has_narrow_kernels(wide: Tensor, ranks: int) -> bool:
    """Whether Triton's passes over a wide matrix are to be taken for `ranks` columns on the narrow side."""
    return _is_half_on_gpu(wide) and wide.shape[0] >= FEWEST_ROWS and ranks <= WIDEST


def _best(rows: Tensor, widths: Sequence[int]) -> Tiling | None:
    """The tiling that leaves the fewest multiprocessors idle in its last wave, the first among equals."""
    if rows.shape[0] < FEWEST_ROWS:
        return None

    def time(tiling: Tiling) -> int:
        tiles = ceil_div(rows.shape[0], tiling.rows) * sum(ceil_div(width, tiling.columns) for width in widths)
        return ceil_div(tiles, processors(rows.device)) * tiling.rows * tiling.columns

    return min(TILINGS, key=time)


def _bulk(wides: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether bulk tensor copies take the operands and what is made of them."""
    matrices = [*wides, *weights]
    return (
        all(map(_is_half_on_gpu, matrices))
        and len({matrix.dtype for matrix in matrices}) == 1
        and len(weights) <= MOST_SITES
        and len({by_row(weight) for weight in weights}) == 1
        and all(by_row(wide) for wide in wides)
        and all(size % 8 == 0 for weight in weights for size in weight.shape)
        and fits(*matrices)
    )


def _is_half_on_gpu(matrix: Tensor) -> bool:
    return matrix.is_cuda and matrix.dtype in (torch.bfloat16, torch.float16) and _has_bulk_copies(matrix.device)


@cache
def _has_bulk_copies(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (9, 0)
