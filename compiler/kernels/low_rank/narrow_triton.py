"""The kernels of `narrow`, in Triton: to be imported where a CUDA device will run them."""
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["rows", "part_steps"])
def product(
    x, rights, scales, out, rows, width, stride, part_steps,
    ENDS: tl.constexpr, SITES: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BULK: tl.constexpr, SPLIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`scale * x @ right.T` of a block of rows: to `out` `[rows, ranks]`, or parts `[parts, rows, RANK]` of it."""
    if SPLIT and EARLY:
        gdc_launch_dependents()
    first_row = tl.program_id(0) * BM
    part = tl.program_id(1)
    row = (first_row + tl.arange(0, BM)).to(tl.int64)[:, None]
    rank = tl.arange(0, RANK)
    sources = rights[0] + rank * width
    scale = tl.zeros((RANK,), tl.float32) + scales[0]
    for site in tl.static_range(1, SITES):
        sources = tl.where(rank >= ENDS[site - 1], rights[site] + (rank - ENDS[site - 1]) * width, sources)
        scale = tl.where(rank >= ENDS[site - 1], scales[site], scale)
    real = rank < ENDS[SITES - 1]
    total = tl.zeros((BM, RANK), tl.float32)
    for step in range(part * part_steps, tl.minimum((part + 1) * part_steps, tl.cdiv(width, BK))):
        column = step * BK + tl.arange(0, BK)
        inside = (column < width)[None, :]
        if BULK:
            block = x.load([first_row, step * BK])
        else:
            block = tl.load(x + row * stride + column[None, :], (row < rows) & inside, 0.0)
        right = tl.load(sources[:, None] + column[None, :], real[:, None] & inside, 0.0)
        total = tl.dot(block, tl.trans(right.to(block.dtype)), total)
    total *= scale[None, :]
    if SPLIT:
        tl.store(out + (part.to(tl.int64) * rows + row) * RANK + rank[None, :], total, row < rows)
    else:
        target = out + row * ENDS[SITES - 1] + rank[None, :]
        tl.store(target, total.to(out.dtype.element_ty), (row < rows) & real[None, :])


@triton.jit(do_not_specialize=["rows", "part_steps", "columns", "starts"])
def gradients(
    wides, u, lefts, row_sums, column_sums, rows, widths, strides, u_stride, part_steps, columns, starts, begins, ranks,
    SITES: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BULK: tl.constexpr,
    BOTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For a block of columns of one site: a part of `wide.T @ u` and, if BOTH, of `wide @ left`.

    The parts: `row_sums` `[parts, columns, RANK]`, the columns those of all sites' blocks, and `column_sums`
    `[blocks, rows, RANK]`. A site has the blocks from `starts` and the columns of u from `begins` on.
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
    for step in range(part * part_steps, tl.minimum((part + 1) * part_steps, tl.cdiv(rows, BM))):
        row = (step * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
        if BULK:
            tile = wide.load([step * BM, block * BN])
        else:
            tile = tl.load(wide + row * stride + column[None, :], (row < rows) & inside, 0.0)
        narrow = tl.load(u + row * u_stride + (begin + rank)[None, :], (row < rows) & real, 0.0)
        total = tl.dot(tl.trans(tile), narrow, total)
        if BOTH:
            target = column_sums + (place.to(tl.int64) * rows + row) * RANK + rank[None, :]
            tl.store(target, tl.dot(tile, left), row < rows)
    target = row_sums + (part.to(tl.int64) * columns + place * BN + tl.arange(0, BN))[:, None] * RANK
    tl.store(target + rank[None, :], total)


@triton.jit
def _sum(
    parts, target, first, last, stride, offset, count, ranks, scale, target_stride, rank_stride, block,
    ROWS: tl.constexpr, RANK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Rows of `target` `[count, ranks]`: `scale` times the sum of `parts[first:last]`, `stride` rows of RANK apart."""
    row = block * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANK)
    mask = (row < count)[:, None] & (rank < ranks)[None, :]
    total = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(first, last, AT_ONCE):
        part = (start + tl.arange(0, AT_ONCE)).to(tl.int64)[:, None, None]
        pointers = parts + (part * stride + (offset + row)[None, :, None]) * RANK + rank[None, None, :]
        total += tl.sum(tl.load(pointers, (part < last) & mask[None, :, :], 0.0), 0)
    pointers = target + row.to(tl.int64)[:, None] * target_stride + rank.to(tl.int64)[None, :] * rank_stride
    tl.store(pointers, (total * scale).to(target.dtype.element_ty), mask)


@triton.jit
def _sums_of_one_dtype(
    parts, targets, firsts, lasts, strides, offsets, counts, ranks, scales, target_strides, rank_strides, starts,
    BEGIN: tl.constexpr, END: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The block of this program in one of the sums from BEGIN to END, which are chosen among and compiled once."""
    program = tl.program_id(0)
    part, target, first, last, stride = parts[BEGIN], targets[BEGIN], firsts[BEGIN], lasts[BEGIN], strides[BEGIN]
    offset, count, columns, scale = offsets[BEGIN], counts[BEGIN], ranks[BEGIN], scales[BEGIN]
    row_step, rank_step, block = target_strides[BEGIN], rank_strides[BEGIN], program - starts[BEGIN]
    for i in tl.static_range(BEGIN + 1, END):
        if program >= starts[i]:
            part, target, first, last, stride = parts[i], targets[i], firsts[i], lasts[i], strides[i]
            offset, count, columns, scale = offsets[i], counts[i], ranks[i], scales[i]
            row_step, rank_step, block = target_strides[i], rank_strides[i], program - starts[i]
    _sum(
        part, target, first, last, stride, offset, count, columns, scale, row_step, rank_step, block,
        ROWS, RANK, AT_ONCE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["firsts", "lasts", "strides", "offsets", "counts", "starts"])
def sums(
    parts, targets, firsts, lasts, strides, offsets, counts, ranks, scales, target_strides, rank_strides, starts,
    FIRST: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Several sums of parts in one launch; sum i has the programs from `starts[i]` on.

    The targets of the first FIRST sums have one dtype, those of the others one.
    """
    if EARLY:
        gdc_wait()  # launched before the parts are there: the launch itself costs as much as the sums
    if tl.program_id(0) < starts[FIRST]:
        _sums_of_one_dtype(
            parts, targets, firsts, lasts, strides, offsets, counts, ranks, scales, target_strides, rank_strides,
            starts, 0, FIRST, ROWS, RANK, AT_ONCE,
        )  # fmt: skip
    elif FIRST < SUMS:
        _sums_of_one_dtype(
            parts, targets, firsts, lasts, strides, offsets, counts, ranks, scales, target_strides, rank_strides,
            starts, FIRST, SUMS, ROWS, RANK, AT_ONCE,
        )  # fmt: skip
