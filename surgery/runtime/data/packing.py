"""Several documents in one row: positions that start over with each, so that none attends to another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush

import torch
from torch import Tensor

from surgery.runtime.data.examples import IGNORED, Examples


@dataclass(frozen=True)
class Packed:
    """Rows of whole documents, by their numbers; every batch is as long as the longest row, so all have one shape."""

    documents: Examples
    rows: tuple[tuple[int, ...], ...]
    labels: None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def longest(self) -> int:
        """The tokens of the longest row."""
        return max(map(self.length, range(len(self))))

    def length(self, row: int) -> int:
        """The tokens of a row."""
        return sum(map(self.documents.length, self.rows[row]))

    def label_count(self, row: int) -> int:
        """How many tokens of a row are predicted: the first of a document is not."""
        return sum(map(self.documents.label_count, self.rows[row]))

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Rows as `input_ids`, `position_ids` and `labels`, [rows, longest]; no mask.

        Positions start over with each document, and with the padding. No document's first token has a label: the one
        before it is another document's.
        """
        shape = (len(rows), self.longest)
        ids = torch.full(shape, self.documents.padding, dtype=torch.int64)
        positions = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for place, row in enumerate(rows):
            start = 0
            for document in self.rows[row]:
                end = start + self.documents.length(document)
                ids[place, start:end] = torch.tensor(self.documents.tokens[document], dtype=torch.int64)
                positions[place, start:end] = torch.arange(end - start)
                labels[place, start + 1 : end] = self.documents.labels_of(document)[1:]
                start = end
            positions[place, start:] = torch.arange(shape[1] - start)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}


def pack(documents: Examples, length: int) -> Packed:
    """Documents of at most `length` tokens into rows of at most that many: best fit, the longest first.

    Each goes into the fullest row that still has room for it, the first of several; documents that are equally long
    keep their order. The rows depend on the documents alone.
    """
    rows: list[list[int]] = []
    free: list[int] = []  # different numbers of free tokens, in order
    open_rows: dict[int, list[int]] = {}  # a heap of the rows with so many free tokens
    for document in sorted(range(len(documents)), key=lambda number: -documents.length(number)):
        size = documents.length(document)
        place = bisect_left(free, size)
        if place == len(free):
            row, left = len(rows), length
            rows.append([])
        else:
            left = free[place]
            row = heappop(open_rows[left])
            if not open_rows[left]:
                del free[place], open_rows[left]
        rows[row].append(document)
        if left > size:
            if left - size not in open_rows:
                insort(free, left - size)
            heappush(open_rows.setdefault(left - size, []), row)
    return Packed(documents, tuple(map(tuple, rows)))
