"""`scaled_columns` in Triton; its backward sums over blocks of rows, which are then added in a fixed order."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 256  # rows whose sums one program makes


@triton.jit
def _scaled(
    y, other, scales, result, sums, rows, width,
    BOTH: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`y * scales` of a part of the rows and a block of columns; if BOTH, the sums of `y * other` over these rows."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    scale = tl.load(scales + columns, inside, 0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, PART, ROWS):
        row = (tl.program_id(1) * PART + start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        place = row[:, None] * width + columns[None, :]
        values = tl.load(y + place, mask, 0.0).to(tl.float32)
        tl.store(result + place, (values * scale[None, :]).to(result.dtype.element_ty), mask)
        if BOTH:
            total += tl.sum(values * tl.load(other + place, mask, 0.0).to(tl.float32), 0)
    if BOTH:
        tl.store(sums + tl.program_id(1).to(tl.int64) * width + columns, total, inside)


def scaled(y: Tensor, scales: Tensor) -> Tensor:
    """`y * scales` like y."""
    return _run(y, None, scales)[0]


def scaled_and_sums(dy: Tensor, y: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """`dy * scales` like dy, and the sums of `dy * y` over all rows like `scales`."""
    result, parts = _run(dy, y, scales)
    return result, parts.sum(0).to(scales.dtype)


def _run(y: Tensor, other: Tensor | None, scales: Tensor) -> tuple[Tensor, Tensor]:
    y, scales, width = y.contiguous(), scales.contiguous(), y.shape[-1]
    rows, result = y.numel() // max(1, width), torch.empty_like(y)
    parts = triton.cdiv(rows, PART)
    sums = y.new_empty((parts if other is not None else 0, width), dtype=torch.float32)
    if y.numel():
        _scaled[triton.cdiv(width, 256), parts](
            y, y if other is None else other.contiguous(), scales, result, sums, rows, width,
            BOTH=other is not None, PART=PART, ROWS=16, COLUMNS=256, num_warps=4,
        )  # fmt: skip
    return result, sums
