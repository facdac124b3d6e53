"""The kernels of `product`, in Triton: to be imported where a CUDA device will run them."""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _place(tile, row_blocks, column_blocks, GROUP: tl.constexpr):
    """The row block and the column block of a tile."""
    first = tile // (GROUP * column_blocks) * GROUP
    size = min(row_blocks - first, GROUP)
    inside = tile % (GROUP * column_blocks)
    return first + inside % size, inside // size


@triton.jit
def _store(y, value, row, column, WIDTH: tl.constexpr, HALVES: tl.constexpr):
    if HALVES:
        low, high = tl.split(tl.permute(tl.reshape(value, (value.shape[0], 2, WIDTH // 2)), (0, 2, 1)))
        y.store([row, column], low.to(y.dtype))
        y.store([row, column + WIDTH // 2], high.to(y.dtype))
    else:
        y.store([row, column], value.to(y.dtype))


@triton.jit(do_not_specialize=["rows"])
def outputs(
    x, u, w0, w1, w2, w3, l0, l1, l2, l3, y0, y1, y2, y3, biases, sizes, starts, firsts, rows, wide_steps, rank_steps,
    SITES: tl.constexpr, BIAS: tl.constexpr, BY_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """`x @ w.T + u[:, first:] @ l.T + bias` of up to four sites; `w` and `l` are stored `[out, .]` where BY_ROW.

    `starts` are the numbers of the column blocks at which the sites begin, and after them that of all blocks.
    """
    ws, ls, ys = (w0, w1, w2, w3), (l0, l1, l2, l3), (y0, y1, y2, y3)
    row_blocks, column_blocks = tl.cdiv(rows, ROWS), starts[SITES]
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=True):
        row_block, column_block = _place(tile, row_blocks, column_blocks, GROUP)
        row, column = row_block * ROWS, column_block * COLUMNS
        w, left, y, bias, size, first = w0, l0, y0, biases[0], sizes[0], firsts[0]
        for site in tl.static_range(1, SITES):
            if column_block >= starts[site]:
                w, left, y, bias, size, first = ws[site], ls[site], ys[site], biases[site], sizes[site], firsts[site]
                column = (column_block - starts[site]) * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(wide_steps + rank_steps):
            a, b, place, shift = x, w, step * DEPTH, 0
            if step >= wide_steps:
                a, b, place, shift = u, left, (step - wide_steps) * DEPTH, first
            part = a.load([row, place + shift])
            if BY_ROW:
                total = tl.dot(part, b.load([column, place]).T, total)
            else:
                total = tl.dot(part, b.load([place, column]), total)
        if BIAS:
            columns = column + tl.arange(0, COLUMNS)
            total += tl.load(bias + columns, mask=columns < size, other=0.0).to(tl.float32)[None, :]
        _store(y, total, row, column, COLUMNS, HALVES)


@triton.jit(do_not_specialize=["rows"])
def input_gradient(
    d0, d1, d2, d3, du, w0, w1, w2, w3, right, dx, starts, rows, size, rank_steps,
    SITES: tl.constexpr, BY_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """`d0 @ w0 + d1 @ w1 + ... + du @ right`; the weights and `right` are stored `[., in]` where BY_ROW.

    `starts` are the steps at which the sites begin, and after them that at which the ranks do.
    """
    ds, ws = (d0, d1, d2, d3), (w0, w1, w2, w3)
    row_blocks, column_blocks = tl.cdiv(rows, ROWS), tl.cdiv(size, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=True):
        row_block, column_block = _place(tile, row_blocks, column_blocks, GROUP)
        row, column = row_block * ROWS, column_block * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(starts[SITES] + rank_steps):
            a, b, start = d0, w0, 0
            for site in tl.static_range(1, SITES):
                if step >= starts[site]:
                    a, b, start = ds[site], ws[site], starts[site]
            if step >= starts[SITES]:
                a, b, start = du, right, starts[SITES]
            place = (step - start) * DEPTH
            part = a.load([row, place])
            if BY_ROW:
                total = tl.dot(part, b.load([place, column]), total)
            else:
                total = tl.dot(part, b.load([column, place]).T, total)
        _store(dx, total, row, column, COLUMNS, HALVES)
