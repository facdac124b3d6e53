"""The kernels of `narrow`, in Triton: to be imported where a CUDA device will run them."""
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["rows", "steps"])
def product(
    x, rights, scales, u, parts, rows, width, stride, steps,
    ENDS: tl.constexpr, SITES: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`scale * x @ right.T` of a block of rows: u `[rows, ranks]`, or if SPLIT parts of it, `[parts, rows, RANK]`."""
    if SPLIT and EARLY:
        gdc_launch_dependents()
    part = tl.program_id(1)
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    rank = tl.arange(0, RANK)
    sources = rights[0] + rank * width
    scale = tl.zeros((RANK,), tl.float32) + scales[0]
    for site in tl.static_range(1, SITES):
        sources = tl.where(rank >= ENDS[site - 1], rights[site] + (rank - ENDS[site - 1]) * width, sources)
        scale = tl.where(rank >= ENDS[site - 1], scales[site], scale)
    real = rank < ENDS[SITES - 1]
    total = tl.zeros((BM, RANK), tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(width, BK))):
        column = step * BK + tl.arange(0, BK)
        inside = (column < width)[None, :]
        block = tl.load(x + row * stride + column[None, :], (row < rows) & inside, 0.0)
        right = tl.load(sources[:, None] + column[None, :], real[:, None] & inside, 0.0)
        total = tl.dot(block, tl.trans(right.to(block.dtype)), total)
    total *= scale[None, :]
    if SPLIT:
        tl.store(parts + (part.to(tl.int64) * rows + row) * RANK + rank[None, :], total, row < rows)
    else:
        target = u + row * ENDS[SITES - 1] + rank[None, :]
        tl.store(target, total.to(u.dtype.element_ty), (row < rows) & real[None, :])


@triton.jit(do_not_specialize=["rows", "steps", "starts"])
def gradients(
    wides, u, lefts, parts, column_parts, rows, widths, strides, u_stride, steps, starts, begins, ranks,
    SITES: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BOTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """For a block of columns of one site and some rows: a part of `wide.T @ u` and, if BOTH, of `wide @ left`.

    The parts are `[programs over rows, columns of all blocks, RANK]` and, in `column_parts`, `[blocks, rows, RANK]`. A
    site has the blocks from `starts` and the columns of u from `begins` on.
    """
    if EARLY:
        gdc_launch_dependents()
    place, part = tl.program_id(0), tl.program_id(1)
    wide, width, stride, left_base = wides[0], widths[0], strides[0], lefts[0]
    begin, columns_of_u, block = begins[0], ranks[0], place
    for site in tl.static_range(1, SITES):
        if place >= starts[site]:
            wide, width, stride, left_base = wides[site], widths[site], strides[site], lefts[site]
            begin, columns_of_u, block = begins[site], ranks[site], place - starts[site]
    column = block * BN + tl.arange(0, BN)
    inside = (column < width)[None, :]
    rank = tl.arange(0, RANK)
    real = (rank < columns_of_u)[None, :]
    if BOTH:
        pointers = left_base + column[:, None] * columns_of_u + rank[None, :]
        left = tl.load(pointers, (column < width)[:, None] & real, 0.0).to(u.dtype.element_ty)
    total = tl.zeros((BN, RANK), tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(rows, BM))):
        row = (step * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
        tile = tl.load(wide + row * stride + column[None, :], (row < rows) & inside, 0.0)
        narrow = tl.load(u + row * u_stride + (begin + rank)[None, :], (row < rows) & real, 0.0)
        total = tl.dot(tl.trans(tile), narrow, total)
        if BOTH:
            target = column_parts + (place.to(tl.int64) * rows + row) * RANK + rank[None, :]
            tl.store(target, tl.dot(tile, left), row < rows)
    columns = starts[SITES] * BN
    target = parts + (part.to(tl.int64) * columns + place * BN + tl.arange(0, BN))[:, None] * RANK
    tl.store(target + rank[None, :], total)


@triton.jit
def _sum(parts, first, last, stride, begin, ROWS: tl.constexpr, RANK: tl.constexpr, AT_ONCE: tl.constexpr):
    """`[ROWS, RANK]` from row `begin` on, summed over `parts[first:last]`, `stride` rows of RANK each."""
    row = tl.minimum(begin + tl.arange(0, ROWS), stride - 1)[None, :, None]
    rank = tl.arange(0, RANK)[None, None, :]
    total = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(first, last, AT_ONCE):
        part = (start + tl.arange(0, AT_ONCE)).to(tl.int64)[:, None, None]
        total += tl.sum(tl.load(parts + (part * stride + row) * RANK + rank, part < last, 0.0), 0)
    return total


@triton.jit(do_not_specialize=["rows", "row_blocks", "count", "starts"])
def column_sums(
    parts, column_parts, u, lefts, rows, row_blocks, count, widths, starts, begins, ranks, scales, u_stride,
    SITES: tl.constexpr, RANK: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
    BOTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """u `[rows, ranks]` from its parts over blocks of columns and, if BOTH, the lefts from their `count` parts."""
    if EARLY:
        gdc_wait()  # launched before the parts are there: the launch itself costs as much as the sums
    program = tl.program_id(0)
    rank = tl.arange(0, RANK)[None, :]
    if program < row_blocks * SITES:
        first, last, begin, columns, scale = starts[0], starts[1], begins[0], ranks[0], scales[0]
        site = program // row_blocks
        for i in tl.static_range(1, SITES):
            if site == i:
                first, last, begin, columns, scale = starts[i], starts[i + 1], begins[i], ranks[i], scales[i]
        row = (program % row_blocks) * ROWS
        total = _sum(column_parts, first, last, rows, row, ROWS, RANK, AT_ONCE) * scale
        row = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        tl.store(u + row * u_stride + begin + rank, total.to(u.dtype.element_ty), (row < rows) & (rank < columns))
    elif BOTH:
        column = (program - row_blocks * SITES) * ROWS
        left, width, columns, first = lefts[0], widths[0], ranks[0], 0
        for i in tl.static_range(1, SITES):
            if column >= starts[i] * BN:
                left, width, columns, first = lefts[i], widths[i], ranks[i], starts[i] * BN
        total = _sum(parts, 0, count, starts[SITES] * BN, column, ROWS, RANK, AT_ONCE)
        column = (column - first + tl.arange(0, ROWS))[:, None]
        mask = (column < width) & (rank < columns)
        tl.store(left + column * columns + rank, total.to(left.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["columns", "count"])
def row_sums(
    parts, rights, columns, width, count,
    ENDS: tl.constexpr, SITES: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The rights `[rank, width]` of all sites from `count` parts `[columns, RANK]` of them under each other."""
    if EARLY:
        gdc_wait()
    first = tl.program_id(0) * ROWS
    total = tl.trans(_sum(parts, 0, count, columns, first, ROWS, RANK, AT_ONCE))
    column = (first + tl.arange(0, ROWS))[None, :]
    rank = tl.arange(0, RANK)[:, None]
    begin = 0
    for site in tl.static_range(SITES):
        mask = (rank >= begin) & (rank < ENDS[site]) & (column < width)
        tl.store(rights[site] + (rank - begin) * width + column, total.to(rights[site].dtype.element_ty), mask)
        begin = ENDS[site]
