"""What a run reads: its rows to train on, packed or not, and those held out."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.compiler.diagnostics import Diagnostic
from surgery.compiler.plan import Plan
from surgery.runtime.data.examples import Examples
from surgery.runtime.data.packing import Packed, pack
from surgery.runtime.data.reader import Reader


@dataclass(frozen=True)
class Data:
    """What `surgery train` reads; `names` are the labels in the order of their numbers."""

    train: Examples | Packed
    held_out: Examples | None
    names: tuple[str, ...] = ()
    cut: int = 0  # rows that were longer than max_length
    dropped: int = 0  # rows that were, and are left out
    warnings: tuple[Diagnostic, ...] = ()

    def fingerprint(self) -> str:
        """A hash of the rows to train on: a run is resumed on the data that it began with."""
        documents = self.train.documents
        rows = self.train.rows if isinstance(self.train, Packed) else None
        digest = hashlib.sha256(json.dumps([documents.labels, documents.padding, rows]).encode())
        for number, tokens in enumerate(documents.tokens):
            digest.update(len(tokens).to_bytes(8, "little") + array("i", tokens).tobytes())
            if documents.learned is not None:
                digest.update(documents.learned[number])
        return digest.hexdigest()

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{len(self.train):,} rows to train on"]
        if isinstance(self.train, Packed):
            documents = self.train.documents
            tokens = sum(map(documents.length, range(len(documents))))
            share = tokens / (len(self.train) * self.train.longest)
            parts = [f"{len(documents):,} documents packed into {parts[0]} ({share:.1%} full)"]
        if self.held_out is not None:
            parts.append(f"{len(self.held_out):,} held out")
        if self.names:
            parts.append(f"{len(self.names)} labels")
        if self.cut:
            parts.append(f"{self.cut:,} rows cut to max_length")
        if self.dropped:
            parts.append(f"{self.dropped:,} rows longer than max_length left out")
        return ", ".join(parts)


def load_data(
    plan: Plan, folder: Path, tokenizer: Any, path: str | Path | None = None, names: Sequence[str] = ()
) -> Data:
    """Read the plan's data, or the file at `path` (relative to the working folder) in its place.

    `tokenizer` is the model's (`tokenizer(list of texts, ...)["input_ids"]`), `folder` the spec's. `names` are the
    labels of an earlier run, whose numbers are kept. Raises SURG050 (unreadable), SURG051 (no such column), SURG052
    (no usable rows, or labels that do not fit the model), SURG059 (rows that the settings refuse), SURG061 (a chat
    template that does not fit), SURG063 (a package is missing).
    """
    reader = Reader(plan, folder, tokenizer)
    rows = reader.documents(reader.training() if path is None else reader.source(path, Path.cwd()))
    evaluation = reader.evaluation()
    held = None if evaluation is None else reader.documents(evaluation)
    if held is None and reader.data.holdout > 0:
        rows, held = reader.split(rows)
    label_names = reader.label_names([rows] if held is None else [rows, held], names)
    train: Examples | Packed = reader.examples(rows, label_names)
    if reader.data.pack:
        train = pack(train.documents, reader.data.max_length)
    held_out = None if held is None else reader.examples(held, label_names)
    return Data(train, held_out, label_names, reader.cut, reader.dropped, tuple(reader.warnings))


def load_evaluation(plan: Plan, folder: Path, tokenizer: Any, path: str | Path, names: Sequence[str] = ()) -> Examples:
    """All rows of one file, to evaluate a run on, with the labels numbered as in `names`. Errors as `load_data`."""
    reader = Reader(plan, folder, tokenizer)
    rows = reader.documents(reader.source(path, Path.cwd()))
    return reader.examples(rows, reader.label_names([rows], names))
