"""Tokenised rows and the batches made of them, padded on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # label of a position that has none, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Examples:
    """Tokenised rows; `labels` holds one per row, or is None where the tokens are their own labels (causal models).

    `learned` then has one byte per token of each row, 1 where it is a label; None: all are.
    """

    tokens: tuple[Sequence[int], ...]  # arrays of 32 bits: lists of a large file would not fit the memory
    labels: tuple[int, ...] | tuple[float, ...] | None
    padding: int
    learned: tuple[bytes, ...] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> Examples:
        """The rows that were read, where a row of a batch may hold several."""
        return self

    def length(self, row: int) -> int:
        """The tokens of a row."""
        return len(self.tokens[row])

    def label_count(self, row: int) -> int:
        """How many tokens of a row are predicted: the first is not; a label of its own counts as one."""
        if self.labels is not None:
            return 1
        return self.length(row) - 1 if self.learned is None else sum(self.learned[row][1:])

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Rows as `input_ids`, `attention_mask` [rows, longest], padded on the right; `labels`, [rows] or like ids."""
        longest = max(len(self.tokens[row]) for row in rows)
        ids = torch.full((len(rows), longest), self.padding, dtype=torch.int64)
        mask = torch.zeros((len(rows), longest), dtype=torch.int64)
        labels = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
        for position, row in enumerate(rows):
            length = len(self.tokens[row])
            ids[position, :length] = torch.tensor(self.tokens[row], dtype=torch.int64)
            mask[position, :length] = 1
            labels[position, :length] = self.labels_of(row)
        if self.labels is not None:
            labels = torch.tensor([self.labels[row] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def labels_of(self, row: int) -> Tensor:
        """The tokens of a row that are learnt, [length], -100 at the others."""
        tokens = torch.tensor(self.tokens[row], dtype=torch.int64)
        if self.learned is None:
            return tokens
        learned = torch.frombuffer(bytearray(self.learned[row]), dtype=torch.bool)
        return tokens.masked_fill(~learned, IGNORED)

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """All rows by their length, which saves padding, `size` at a time: for evaluation."""
        order = sorted(range(len(self)), key=self.length)
        for start in range(0, len(self), size):
            yield self.batch(order[start : start + size])
