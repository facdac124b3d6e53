"""All weights of an event in one launch: a program takes a strip of one weight, tile by tile.

Where the strips and the tensors lie is a table on the device, which stays as long as the tensors do. Every number is
computed by one program in one order, so a run repeats to the bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

FIELDS = 12  # numbers per site in the table
WIDEST = 128  # above this rank arithmetic costs more than moving the weight, by count: that is cuBLAS's
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Tiles:
    """How a weight is cut: tiles of `rows x columns`, `strip` columns per program, and how a program runs."""

    rows: int
    columns: int
    strip: int
    warps: int
    stages: int
    precision: str  # of the products of float32 factors


def tiles_for(dtype: torch.dtype) -> Tiles:
    """The quickest form of those that `tests/benchmarks/kernels/moved.py` times, for weights of a dtype, on an H200.

    tf32 products of float32 factors were right to 8e-4 of the largest change, which is below a half precision weight's
    own rounding; tf32x3 to 3e-7.
    """
    if dtype == torch.float32:
        return Tiles(32, 128, 2048, 4, 1, "tf32x3")
    return Tiles(128, 64, 512, 4, 1, "tf32")


@triton.jit  # type: ignore[untyped-decorator]
def _move(  # type: ignore[no-untyped-def]
    sites,
    strips,
    scale,
    TARGET: tl.constexpr,
    FACTOR: tl.constexpr,
    RANK: tl.constexpr,
    BEFORE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One strip: `ROWS` rows and at most `STRIP` columns of one site's weight as it is stored."""
    strip = strips + 3 * tl.program_id(0)
    site = sites + FIELDS * tl.load(strip).to(tl.int64)
    row0 = tl.load(strip + 1)
    column0 = tl.load(strip + 2)
    target = tl.load(site).to(tl.pointer_type(TARGET))
    source = tl.load(site + 1).to(tl.pointer_type(TARGET))
    left = tl.load(site + 2).to(tl.pointer_type(FACTOR))
    right = tl.load(site + 3).to(tl.pointer_type(FACTOR))
    left_before = tl.load(site + 4).to(tl.pointer_type(FACTOR))
    right_before = tl.load(site + 5).to(tl.pointer_type(FACTOR))
    row_count = tl.load(site + 6).to(tl.int32)
    column_count = tl.load(site + 7).to(tl.int32)
    rank = tl.load(site + 8).to(tl.int32)
    stride = tl.load(site + 9)
    left_stride = tl.load(site + 10).to(tl.int32)
    right_stride = tl.load(site + 11).to(tl.int32)
    if ALIGNED:  # whole vectors of 16 bytes
        target = tl.multiple_of(target, 16)
        source = tl.multiple_of(source, 16)
        stride = tl.multiple_of(stride, 16)
        column0 = tl.multiple_of(column0, 16)
        column_count = tl.multiple_of(column_count, 16)
    if ALIGNED and not TRANSPOSED:
        right = tl.multiple_of(right, 16)
        right_before = tl.multiple_of(right_before, 16)
        right_stride = tl.multiple_of(right_stride, 16)
    rows = row0 + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    in_left = (rows < row_count)[:, None] & (ranks < rank)[None, :]
    if TRANSPOSED:  # what is stored is the transpose: its left factor is the right one's, and the other way round
        at_left = rows[:, None] + ranks[None, :] * left_stride
    else:
        at_left = rows[:, None] * left_stride + ranks[None, :]
    first = tl.load(left + at_left, in_left, 0.0).to(tl.float32)
    if BEFORE:
        first_before = tl.load(left_before + at_left, in_left, 0.0).to(tl.float32)
        first = first - first_before
    offset = row0.to(tl.int64) * stride
    at_row = tl.arange(0, ROWS)[:, None] * stride.to(tl.int32)
    for start in tl.range(column0, min(column0 + STRIP, column_count), COLUMNS, num_stages=STAGES):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < column_count
        in_right = (ranks < rank)[:, None] & inside[None, :]
        if TRANSPOSED:
            at_right = ranks[:, None] + columns[None, :] * right_stride
        else:
            at_right = ranks[:, None] * right_stride + columns[None, :]
        at = offset + at_row + columns[None, :]
        in_target = (rows < row_count)[:, None] & inside[None, :]
        weight = tl.load(source + at, in_target, 0.0)
        second = tl.load(right + at_right, in_right, 0.0).to(tl.float32)
        change = tl.dot(first, second, input_precision=PRECISION)
        if BEFORE:
            second = second - tl.load(right_before + at_right, in_right, 0.0).to(tl.float32)
            change = tl.dot(first_before, second, change, input_precision=PRECISION)
        tl.store(target + at, (weight.to(tl.float32) + scale * change).to(TARGET), in_target)


@dataclass(frozen=True)
class _Launch:
    """One launch: the tables of its sites, and the constants that they have in common."""

    sites: Tensor  # [sites, FIELDS] int64
    strips: Tensor  # [strips, 3] int32: site, row, column
    constants: dict[str, Any]
    warps: int


@dataclass(frozen=True)
class _Known:
    """What was found out about lists of tensors, good as long as they are these tensors at these addresses."""

    tensors: tuple[weakref.ref[Tensor], ...]
    addresses: tuple[int, ...]
    transposed: bool
    launches: tuple[_Launch, ...]
    done: tuple[int, ...]

    def holds(self, tensors: Sequence[Tensor], transposed: bool) -> bool:
        """Whether these are the tensors, and stored so."""
        same = len(tensors) == len(self.tensors) and transposed == self.transposed
        return same and all(
            reference() is tensor and address == tensor.data_ptr()
            for reference, address, tensor in zip(self.tensors, self.addresses, tensors, strict=True)
        )


_known: Any = WeakIdKeyDictionary()  # by the first left factor, which no other event of a step has for its own


def add_products(
    targets: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scale: float,
    before: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    sources: Sequence[Tensor],
    transposed: bool,
    tiles: Tiles | None = None,
) -> Sequence[int]:
    """`moved_weights.add_products` for those of the weights that the kernel takes; gives their numbers."""
    old = ((), ()) if before is None else before
    tensors = [*targets, *sources, *lefts, *rights, *old[0], *old[1]]
    known: _Known | None = _known.get(lefts[0])
    if known is None or tiles is not None or not known.holds(tensors, transposed):
        known = _prepare(targets, lefts, rights, before, sources, transposed, tensors, tiles)
        _known[lefts[0]] = known
    for launch in known.launches:
        grid = (launch.strips.shape[0],)
        _move[grid](launch.sites, launch.strips, scale, num_warps=launch.warps, **launch.constants)
    return known.done


def _prepare(
    targets: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    before: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    sources: Sequence[Tensor],
    transposed: bool,
    tensors: Sequence[Tensor],
    tiles: Tiles | None,
) -> _Known:
    groups: dict[tuple[Any, ...], list[list[int]]] = {}
    done, written = [], set[int]()
    for number, target in enumerate(targets):
        factors = [lefts[number], rights[number]]
        factors += [] if before is None else [before[0][number], before[1][number]]
        shared = target.data_ptr() in written  # moved twice, it cannot be in one launch
        if shared or target.device != targets[0].device or not _fits(target, sources[number], factors, transposed):
            continue
        written.add(target.data_ptr())
        done.append(number)
        rank = lefts[number].shape[-1]
        for matrix in range(target.shape[0]) if target.dim() == 3 else (None,):
            row, aligned = _row(target, sources[number], factors, rank, transposed, matrix)
            padded = max(16, triton.next_power_of_2(rank))
            groups.setdefault((target.dtype, factors[0].dtype, padded, aligned), []).append(row)
    launches = []
    for (dtype, factor, rank, aligned), rows in groups.items():
        cut = tiles_for(dtype) if tiles is None else tiles
        constants = {
            "TARGET": _TYPES[dtype], "FACTOR": _TYPES[factor], "RANK": rank, "BEFORE": before is not None,
            "TRANSPOSED": transposed, "ALIGNED": aligned, "FIELDS": FIELDS, "ROWS": cut.rows, "COLUMNS": cut.columns,
            "STRIP": cut.strip, "STAGES": cut.stages, "PRECISION": cut.precision,
        }  # fmt: skip
        strips = [
            (site, row, column)
            for site, (_, _, _, _, _, _, height, width, *_) in enumerate(rows)
            for row in range(0, height, cut.rows)
            for column in range(0, width, cut.strip)
        ]
        device = tensors[0].device
        table = _on(device, torch.tensor(rows, dtype=torch.int64))
        launches.append(_Launch(table, _on(device, torch.tensor(strips, dtype=torch.int32)), constants, cut.warps))
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    return _Known(tuple(map(weakref.ref, tensors)), addresses, transposed, tuple(launches), tuple(done))


def _fits(target: Tensor, source: Tensor, factors: Sequence[Tensor], transposed: bool) -> bool:
    """Whether the kernel takes a weight: rows that are contiguous, factors too, all on one device."""
    leading = target.shape[:-2]
    outputs, inputs = target.shape[-2:][::-1] if transposed else target.shape[-2:]
    rank = factors[0].shape[-1]
    sizes = ((*leading, outputs, rank), (*leading, rank, inputs))
    return (
        target.dim() in (2, 3)
        and target.numel() > 0
        and 1 <= rank <= WIDEST
        and target.dtype in _TYPES
        and factors[0].dtype in _TYPES
        and target.stride(-1) == 1
        and (source.dtype, source.shape, source.stride()) == (target.dtype, target.shape, target.stride())
        and all(tensor.device == target.device for tensor in (source, *factors))
        and all(tensor.dtype == factors[0].dtype and tensor.is_contiguous() for tensor in factors)
        and all(tuple(tensor.shape) == sizes[number % 2] for number, tensor in enumerate(factors))
    )


def _row(
    target: Tensor, source: Tensor, factors: Sequence[Tensor], rank: int, transposed: bool, matrix: int | None
) -> tuple[list[int], bool]:
    """A row of the table, in the order in which the kernel reads it, and whether its vectors are whole."""
    tensors = [target, source, *factors]
    if matrix is not None:
        tensors = [tensor[matrix] for tensor in tensors]
    addresses = [tensor.data_ptr() for tensor in tensors]
    addresses += [0] * (6 - len(addresses))
    height, width = tensors[0].shape
    inputs = height if transposed else width
    strides = (inputs, rank) if transposed else (rank, inputs)
    if transposed:  # W.T = right.T @ left.T
        addresses[2:] = [addresses[3], addresses[2], addresses[5], addresses[4]]
    stride = tensors[0].stride(0)
    aligned = not any(address % 16 for address in addresses) and stride % 16 == 0 and width % 16 == 0
    return [*addresses, height, width, rank, stride, *strides], aligned


def _on(device: torch.device, table: Tensor) -> Tensor:
    """The table on the device, without waiting for it."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
