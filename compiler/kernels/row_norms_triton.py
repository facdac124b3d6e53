"""The norms of `row_norms.py` in Triton: a program walks along its rows once and has all three terms at the end.

Right and the weight alone are read along it: `right @ right.T` is made once before."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norms(
    weight, left, right, inner, norms, products, outputs, inputs, rank, scale,
    weight_row, weight_column, left_row, left_column, right_row, right_column,
    FORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """A block of rows: `W @ right.T` and the squares of W along one walk; `inner` is right @ right.T."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    index = tl.arange(0, RANK)
    product = tl.zeros((ROWS, RANK), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, inputs, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        mask = (rows < outputs)[:, None] & (columns < inputs)[None, :]
        w = tl.load(weight + rows[:, None] * weight_row + columns[None, :] * weight_column, mask, 0.0)
        mask = (index < rank)[:, None] & (columns < inputs)[None, :]
        r = tl.load(right + index[:, None] * right_row + columns[None, :] * right_column, mask, 0.0)
        wide = w.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        if FORM == "half":
            product = tl.dot(w, tl.trans(r), product)
        elif FORM == "parts":  # of 8 bits each: their products with a bfloat16 are exact
            high = r.to(tl.bfloat16)
            rest = r - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            product = tl.dot(w, tl.trans(low), product)
            product = tl.dot(w, tl.trans(middle), product)
            product = tl.dot(w, tl.trans(high), product)
        else:  # three products in tf32 have what one in float32 has
            product = tl.dot(wide, tl.trans(r.to(tl.float32)), product, input_precision="tf32x3")
    mask = (rows < outputs)[:, None] & (index < rank)[None, :]
    tl.store(products + rows[:, None] * rank + index[None, :], product, mask)
    factor = tl.load(left + rows[:, None] * left_row + index[None, :] * left_column, mask, 0.0).to(tl.float32)
    within = (index < rank)[:, None] & (index < rank)[None, :]
    between = tl.load(inner + index[:, None] * rank + index[None, :], within, 0.0)
    turned = tl.dot(factor, between, input_precision="tf32x3")
    squares += tl.sum(factor * (2 * scale * product + scale * scale * turned), 1)
    tl.store(norms + rows, tl.sqrt(tl.maximum(squares, 0.0)), rows < outputs)


def norms_and_product(
    weight: Tensor, left: Tensor, right: Tensor, scale: float, rows: int = 32, columns: int | None = None,
    warps: int = 4, stages: int = 3,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The norms, and `weight @ right.T`; a program takes `rows` rows, `columns` columns at a time."""
    (outputs, inputs), rank = weight.shape, right.shape[0]
    norms = weight.new_empty(outputs, dtype=torch.float32)
    inner = right.float() @ right.float().T  # once, and not by every block of rows
    products, padded = norms.new_empty(outputs, rank), max(16, triton.next_power_of_2(rank))
    if weight.dtype == right.dtype != torch.float32:
        form = "half"
    elif weight.dtype == torch.bfloat16 and right.dtype == torch.float32:
        form = "parts"
    else:
        form = "wide"
    if columns is None:  # so that what is on its way fits into shared memory
        columns = 4096 // padded if form == "half" else 2048 // padded if form == "parts" else 1024 // padded
        columns = max(16, min(256, columns))
    if outputs:
        _norms[triton.cdiv(outputs, rows),](
            weight, left, right, inner, norms, products, outputs, inputs, rank, scale,
            *weight.stride(), *left.stride(), *right.stride(),
            FORM=form, ROWS=rows, COLUMNS=columns, RANK=padded, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return norms, products
