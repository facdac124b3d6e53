"""`updated_weight` in Triton: a program makes one tile of the result, its piece of the product and W read once."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _update(
    weight, left, right, result, outputs, inputs, rank, scale,
    weight_row, weight_column, left_row, left_column, right_row, right_column, result_row, result_column,
    TIMES: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """One tile of the result: its piece of the product, and W once."""
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    inside = (rows < outputs) & (columns < inputs)
    wide = tl.load(weight + rows * weight_row + columns * weight_column, inside, 0.0).to(tl.float32)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANK):
        index = start + tl.arange(0, RANK)
        mask = (rows < outputs) & (index[None, :] < rank)
        a = tl.load(left + rows * left_row + index[None, :] * left_column, mask, 0.0)
        mask = (index[:, None] < rank) & (columns < inputs)
        b = tl.load(right + index[:, None] * right_row + columns * right_column, mask, 0.0)
        if HALF:
            product = tl.dot(a, b, product)
        else:  # tf32 alone rounds the factors to 10 bits; three products of it have what float32 has
            product = tl.dot(a.to(tl.float32), b.to(tl.float32), product, input_precision="tf32x3")
    product *= scale
    if TIMES == "mask":
        product = tl.where(wide != 0, product, 0.0)
    if TIMES == "weight":
        product *= wide
    value = (wide + product).to(result.dtype.element_ty)
    tl.store(result + rows * result_row + columns * result_column, value, inside)


def updated_weight(
    weight: Tensor, left: Tensor, right: Tensor, scale: float, times: str, rows: int = 64, columns: int = 128,
    warps: int = 4,
) -> Tensor:  # fmt: skip
    """The weight, in tiles of `rows` by `columns`; what it is stands in `updated_weight.py`."""
    if weight.stride(0) == 1 and weight.stride(1) != 1:  # neighbours in a tile are to be neighbours in memory
        return updated_weight(weight.T, right.T, left.T, scale, times, rows, columns, warps).T
    result = torch.empty_like(weight)
    (outputs, inputs), rank = weight.shape, left.shape[1]
    if not weight.numel():
        return result
    strides = (*weight.stride(), *left.stride(), *right.stride(), *result.stride())
    _update[triton.cdiv(inputs, columns), triton.cdiv(outputs, rows)](
        weight, left, right, result, outputs, inputs, rank, scale, *strides,
        TIMES=times, HALF=left.dtype == right.dtype != torch.float32, ROWS=rows, COLUMNS=columns,
        RANK=min(64, max(16, triton.next_power_of_2(rank))), num_warps=warps,
    )  # fmt: skip
    return result
