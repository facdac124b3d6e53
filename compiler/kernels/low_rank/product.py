"""The wide products of the low-rank linear in Triton, for GPUs with bulk tensor copies (Hopper and later).

A low-rank change is a few more columns of the inputs and of the weight: `[x | u] @ [weight | left].T`. So each kernel
is one persistent matrix product whose loop over the inner dimension goes on from one pair of operands to the next;
which pair a step reads is a choice between tensor descriptors, and the copies stay pipelined across it. The forward
makes the outputs of all sites that read one input in one launch, the backward sums the input gradients of all sites in
one accumulator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

from torch import Tensor

from surgery.compiler.kernels.forms import by_row, ceil_div, processors
from surgery.compiler.kernels.low_rank import plain

MOST_SITES = 4
ALIGNED = 16
"""The bytes that a bulk tensor copy needs addresses and strides to be multiples of."""


class Tiling(NamedTuple):
    """What one program computes at a time, and how."""

    rows: int
    columns: int
    depth: int = 64
    stages: int = 3
    warps: int = 8
    group: int = 8  # row blocks that are worked on together, so that operands are found in the cache
    halves: bool = True  # a tile is stored in two halves, which leaves shared memory for one more stage
    resident: int = 1  # programs on each multiprocessor


@cache
def _kernels() -> Any:
    """The module of the kernels; torch for a CPU comes without Triton."""
    from surgery.compiler.kernels.low_rank import product_triton

    return product_triton


def fits(*matrices: Tensor) -> bool:
    """Whether bulk tensor copies can read the matrices: addresses and strides are multiples of 16 bytes."""
    return all(_fits(matrix) for matrix in matrices)


def _fits(matrix: Tensor) -> bool:
    step = matrix.stride(0) if matrix.stride(1) == 1 else matrix.stride(1) if matrix.stride(0) == 1 else 0
    return step > 0 and step * matrix.element_size() % ALIGNED == 0 and matrix.data_ptr() % ALIGNED == 0


def aligned(rows: int, columns: int, like: Tensor) -> Tensor:
    """An empty matrix `[rows, columns]` whose rows begin where a bulk tensor copy can read them."""
    step = ALIGNED // like.element_size()
    return like.new_empty(rows, ceil_div(columns, step) * step)[:, :columns]


def outputs(
    rows: Tensor, u: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lefts: Sequence[Tensor],
    tiling: Tiling,
) -> list[Tensor]:  # fmt: skip
    """`rows @ weight.T + bias + u @ left.T` of up to four sites, `[rows, out]` each; u has the columns of all sites."""
    straight = by_row(weights[0])
    ys = [rows.new_empty(rows.shape[0], weight.shape[0]) for weight in weights]
    u, firsts = _spaced(u, [left.shape[1] for left in lefts])
    lefts = [_operand(left, straight, rows) for left in plain.cast(lefts, rows.dtype)]
    has_bias = any(bias is not None for bias in biases)
    vectors = ys  # of the right type, and not read
    if has_bias:
        given = zip(biases, ys, strict=True)
        vectors = [rows.new_zeros(y.shape[1]) if bias is None else bias.contiguous() for bias, y in given]
    sizes = [weight.shape[0] for weight in weights]
    starts = [0, *accumulate(ceil_div(size, tiling.columns) for size in sizes)]
    block = [tiling.columns, tiling.depth]
    _kernels().outputs[_grid(rows, starts[-1], tiling)](
        _descriptor(rows, [tiling.rows, tiling.depth]),
        _descriptor(u, [tiling.rows, tiling.depth]),
        *_four(_descriptor(weight, block) for weight in weights),
        *_four(_descriptor(left, block) for left in lefts),
        *_four(_descriptor(y, [tiling.rows, tiling.columns // (1 + tiling.halves)]) for y in ys),
        *(tuple(vectors), tuple(sizes), tuple(starts), tuple(firsts)),
        *(rows.shape[0], ceil_div(rows.shape[1], tiling.depth)),
        ceil_div(max(left.shape[1] for left in lefts), tiling.depth),
        **_constants(len(weights), straight, tiling),
        BIAS=has_bias,
    )
    return ys


def input_gradient(
    dys: Sequence[Tensor], weights: Sequence[Tensor], du: Tensor | None, rights: Sequence[Tensor], tiling: Tiling
) -> Tensor:
    """The sum of `dy @ weight` over up to four sites, and of `du @ right` if du is given, `[rows, in]`."""
    straight = by_row(weights[0])
    rows, size = dys[0].shape[0], weights[0].shape[1]
    dx = dys[0].new_empty(rows, size)
    starts = [0, *accumulate(ceil_div(dy.shape[1], tiling.depth) for dy in dys)]
    block = [tiling.depth, tiling.columns]
    inputs = [_descriptor(dy, [tiling.rows, tiling.depth]) for dy in dys]
    wide = [_descriptor(weight, block) for weight in weights]
    du_input, right, rank_steps = inputs[0], wide[0], 0
    if du is not None:
        du_input = _descriptor(_spaced(du, [du.shape[1]])[0], [tiling.rows, tiling.depth])
        right = _descriptor(_operand(plain.joined(rights, dx.dtype), straight, dx), block)
        rank_steps = ceil_div(du.shape[1], tiling.depth)
    _kernels().input_gradient[_grid(dx, ceil_div(size, tiling.columns), tiling)](
        *(*_four(inputs), du_input, *_four(wide), right),
        _descriptor(dx, [tiling.rows, tiling.columns // (1 + tiling.halves)]),
        *(tuple(starts), rows, size, rank_steps),
        **_constants(len(weights), straight, tiling),
    )
    return dx


def _grid(rows: Tensor, column_blocks: int, tiling: Tiling) -> tuple[int]:
    tiles = ceil_div(rows.shape[0], tiling.rows) * column_blocks
    return (min(processors(rows.device) * tiling.resident, tiles),)


def _operand(matrix: Tensor, straight: bool, like: Tensor) -> Tensor:
    """A factor stored the way the weights are, and so that bulk copies take it."""
    if by_row(matrix) == straight and fits(matrix):
        return matrix
    rows, columns = matrix.shape
    stored = aligned(rows, columns, like) if straight else aligned(columns, rows, like).T
    return stored.copy_(matrix)


def _spaced(u: Tensor, ranks: Sequence[int]) -> tuple[Tensor, list[int]]:
    """u where the columns of each site begin at an address that a bulk copy takes, and these beginnings."""
    step = ALIGNED // u.element_size()
    packed = [sum(ranks[:site]) for site in range(len(ranks))]
    if fits(u) and all(first % step == 0 for first in packed):
        return u, packed
    spaced = [sum(ceil_div(rank, step) * step for rank in ranks[:site]) for site in range(len(ranks))]
    copy = aligned(u.shape[0], spaced[-1] + ranks[-1], u).zero_()
    for source, target, rank in zip(packed, spaced, ranks, strict=True):
        copy[:, target : target + rank] = u[:, source : source + rank]
    return copy, spaced


def _descriptor(matrix: Tensor, block: list[int]) -> Any:
    """What a bulk copy of one block needs to know; of a matrix stored by columns that of its transposed."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if by_row(matrix):
        return TensorDescriptor.from_tensor(matrix, block)
    return TensorDescriptor.from_tensor(matrix.T, block[::-1])


def _four(values: Iterable[Any]) -> list[Any]:
    """One for each place of a site in a kernel; None where there is no site."""
    given = [*values]
    return given + [None] * (MOST_SITES - len(given))


def _constants(count: int, straight: bool, tiling: Tiling) -> dict[str, Any]:
    return {
        "SITES": count, "BY_ROW": straight, "ROWS": tiling.rows, "COLUMNS": tiling.columns, "DEPTH": tiling.depth,
        "GROUP": tiling.group, "HALVES": tiling.halves,
        "num_stages": tiling.stages, "num_warps": tiling.warps,
    }  # fmt: skip
