"""The batches of a run by the number of their step.

The batch of optimizer step t is a pure function of (rows, seed, t): epoch = t // batches, and an epoch's order is a
permutation drawn from (seed, epoch). So a run is resumed inside an epoch by its step number alone. Of several `step`
blocks each begins with an epoch of its own, whose order no block before it has seen.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from surgery.compiler.plan import Plan
from surgery.runtime.data.examples import Examples
from surgery.runtime.data.packing import Packed


@dataclass(frozen=True)
class Stream:
    """The batches of a run by the number of their optimizer step; the last batch of an epoch may be smaller.

    Of several `processes` each takes every so-manieth row of a batch, so that all have about as many tokens.
    """

    examples: Examples | Packed
    size: int
    seed: int
    process: int = 0  # this one's number
    processes: int = 1
    first: int = 0  # the step of the run that it begins with
    epochs: int = 0  # those that were begun before it
    _orders: dict[int, list[int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps that see every row once."""
        return math.ceil(len(self.examples) / self.size)

    def position(self, step: int) -> tuple[int, int]:
        """The epoch, and the number of the batch in it, of a step (all from 0)."""
        epoch, number = divmod(step - self.first, self.batches_per_epoch)
        return epoch + self.epochs, number

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch in their order."""
        if epoch not in self._orders:
            self._orders.clear()  # only the running epoch is kept
            self._orders[epoch] = torch.randperm(len(self.examples), generator=seeded(self.seed, epoch)).tolist()
        return self._orders[epoch]

    def rows(self, step: int) -> list[int]:
        """The rows of a step's batch, of all processes, the shortest first, which saves micro-batches padding."""
        epoch, number = self.position(step)
        rows = self.order(epoch)[number * self.size : (number + 1) * self.size]
        return sorted(rows, key=self.examples.length)

    def batch(self, step: int) -> dict[str, Tensor]:
        """This process's part of the batch of an optimizer step, counted from 0; it may have no rows."""
        rows = self.rows(step)
        if own := rows[self.process :: self.processes]:
            return self.examples.batch(own)
        return {name: tensor[:0] for name, tensor in self.examples.batch(rows[:1]).items()}


def lengths_of(plan: Plan, rows: int) -> tuple[int, ...]:
    """Optimizer steps of each `step` block over `rows` rows: `steps`, else `epochs` (1 where it names neither)."""
    return tuple(
        max(1, math.ceil((1.0 if step.epochs is None else step.epochs) * math.ceil(rows / step.batch)))
        if step.steps is None
        else step.steps
        for step in plan.step_blocks
    )


def block_of(step: int, lengths: Sequence[int]) -> int:
    """The number of the `step` block, from 0, that a step is of; behind the last one it is the last."""
    return min(bisect_right(list(accumulate(lengths)), step), len(lengths) - 1)


def streams_of(
    plan: Plan, examples: Examples | Packed, lengths: Sequence[int], process: int = 0, processes: int = 1
) -> tuple[Stream, ...]:
    """The batches of each `step` block, of so many steps."""
    found, first, epochs = [], 0, 0
    for step, length in zip(plan.step_blocks, lengths, strict=True):
        found.append(Stream(examples, step.batch, step.seed, process, processes, first, epochs))
        first, epochs = first + length, epochs + math.ceil(length / found[-1].batches_per_epoch)
    return tuple(found)


def seeded(seed: int, epoch: int) -> torch.Generator:
    """The generator of an epoch's order; -1 chooses the rows to hold out, -2 those to calibrate with."""
    digest = hashlib.sha256(f"surgery data {seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
