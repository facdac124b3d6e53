"""Data of a spec: rows -> tokens and labels -> batches, the same ones on every machine and after every resume.

The batch of optimizer step t is a pure function of (rows, seed, t): epoch = t // batches, and an epoch's order is a
permutation drawn from (seed, epoch). So a run is resumed inside an epoch by its step number alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.compiler.diagnostics import Diagnostic, SurgError, did_you_mean, fail
from surgery.compiler.plan import DataPlan, Plan
from surgery.runtime.places import place_notes, span_of
from surgery.runtime.rows import DataFile, Row

IGNORED = -100  # label of a position that has none, as in torch.nn.functional.cross_entropy
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Examples:
    """Tokenised rows; `labels` holds one per row, or is None where the tokens are their own labels (causal models)."""

    tokens: tuple[Sequence[int], ...]  # arrays of 32 bits: lists of a large file would not fit the memory
    labels: tuple[int, ...] | tuple[float, ...] | None
    padding: int

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Rows as `input_ids`, `attention_mask` [rows, longest], padded on the right; `labels`, [rows] or like ids."""
        longest = max(len(self.tokens[row]) for row in rows)
        ids = torch.full((len(rows), longest), self.padding, dtype=torch.int64)
        mask = torch.zeros((len(rows), longest), dtype=torch.int64)
        for position, row in enumerate(rows):
            tokens = self.tokens[row]
            ids[position, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[position, : len(tokens)] = 1
        if self.labels is None:
            labels = ids.masked_fill(mask == 0, IGNORED)
        else:
            labels = torch.tensor([self.labels[row] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """All rows by their length, which saves padding, `size` at a time: for evaluation."""
        order = sorted(range(len(self)), key=lambda row: len(self.tokens[row]))
        for start in range(0, len(self), size):
            yield self.batch(order[start : start + size])


@dataclass(frozen=True)
class Stream:
    """The batches of a run by the number of their optimizer step; the last batch of an epoch may be smaller."""

    examples: Examples
    size: int
    seed: int
    _orders: dict[int, list[int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps that see every row once."""
        return math.ceil(len(self.examples) / self.size)

    def position(self, step: int) -> tuple[int, int]:
        """The epoch, and the number of the batch in it, of a step (all from 0)."""
        return divmod(step, self.batches_per_epoch)

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch in their order."""
        if epoch not in self._orders:
            self._orders.clear()  # only the running epoch is kept
            self._orders[epoch] = torch.randperm(len(self.examples), generator=seeded(self.seed, epoch)).tolist()
        return self._orders[epoch]

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of an optimizer step, counted from 0; its rows by length, to save micro-batches padding."""
        epoch, number = self.position(step)
        rows = self.order(epoch)[number * self.size : (number + 1) * self.size]
        return self.examples.batch(sorted(rows, key=lambda row: len(self.examples.tokens[row])))


@dataclass(frozen=True)
class Data:
    """What `surgery train` reads; `names` are the labels in the order of their numbers."""

    train: Examples
    held_out: Examples | None
    names: tuple[str, ...] = ()
    cut: int = 0  # rows that were longer than max_length
    warnings: tuple[Diagnostic, ...] = ()

    def fingerprint(self) -> str:
        """A hash of the rows to train on: a run is resumed on the data that it began with."""
        digest = hashlib.sha256(json.dumps([self.train.labels, self.train.padding]).encode())
        for tokens in self.train.tokens:
            digest.update(len(tokens).to_bytes(8, "little") + array("i", tokens).tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{len(self.train):,} rows to train on"]
        if self.held_out is not None:
            parts.append(f"{len(self.held_out):,} held out")
        if self.names:
            parts.append(f"{len(self.names)} labels")
        if self.cut:
            parts.append(f"{self.cut:,} rows cut to max_length")
        return ", ".join(parts)


def steps_of(plan: Plan, rows: int) -> int:
    """Optimizer steps of a run over `rows` rows: `steps`, else `epochs` (1 where the spec names neither)."""
    if plan.step.steps is not None:
        return plan.step.steps
    epochs = 1.0 if plan.step.epochs is None else plan.step.epochs
    return max(1, math.ceil(epochs * math.ceil(rows / plan.step.batch)))


def load_data(
    plan: Plan, folder: Path, tokenizer: Any, path: str | Path | None = None, names: Sequence[str] = ()
) -> Data:
    """Read the plan's data, or the file at `path` (relative to the working folder) in its place.

    `tokenizer` is the model's (`tokenizer(list of texts, ...)["input_ids"]`), `folder` the spec's. `names` are the
    labels of an earlier run, whose numbers are kept. Raises SURG050 (unreadable), SURG051 (no such column), SURG052
    (no usable rows, or labels that do not fit the model).
    """
    reader = _Reader(plan, folder, tokenizer)
    file = reader.file(reader.data.path) if path is None else DataFile(path, Path.cwd())
    rows = reader.read(file)
    evaluation = reader.read(reader.file(reader.data.eval)) if reader.data.eval is not None else None
    held: list[_Text] | None = None
    if evaluation is not None:
        held = evaluation
    elif reader.data.holdout > 0:
        rows, held = reader.split(file, rows)
    label_names = reader.label_names(file, [*rows, *(held or ())], names)
    train = reader.examples(file, rows, label_names)
    held_out = reader.examples(file, held, label_names) if held is not None else None
    return Data(train, held_out, label_names, reader.cut, tuple(reader.warnings))


def load_evaluation(plan: Plan, folder: Path, tokenizer: Any, path: str | Path, names: Sequence[str] = ()) -> Examples:
    """All rows of one file, to evaluate a run on, with the labels numbered as in `names`. Errors as `load_data`."""
    reader = _Reader(plan, folder, tokenizer)
    file = DataFile(path, Path.cwd())
    rows = reader.read(file)
    return reader.examples(file, rows, reader.label_names(file, rows, names))


def seeded(seed: int, epoch: int) -> torch.Generator:
    """The generator of an epoch's order; -1 chooses the rows to hold out, -2 those to calibrate with."""
    digest = hashlib.sha256(f"surgery data {seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class _Text:
    """A row after its template: text, label as it stands in the file, and where it comes from."""

    text: str
    label: Any
    row: int
    file: DataFile


class _Reader:
    """Reads the files of one plan."""

    def __init__(self, plan: Plan, folder: Path, tokenizer: Any) -> None:
        if plan.data is None:
            raise fail("SURG050", "the spec names no data", help='add a block: data "rows.jsonl" { text = "{text}" }')
        self.data: DataPlan = plan.data
        self.plan = plan
        self.folder = folder
        self.tokenizer = tokenizer
        self.cut = 0
        self.warnings: list[Diagnostic] = []
        self.causal = plan.model.task == "causal_lm"
        if not self.causal and plan.model.task != "sequence_classification":
            task = "a model without a task" if plan.model.task is None else f"the task {plan.model.task}"
            raise self.problem("SURG008", f"a data block for {task} is not read yet")
        if not self.causal and self.data.label is None:
            raise self.problem("SURG051", "a classification needs `label`, the column of the classes")
        if self.causal and self.data.label is not None:
            raise self.problem("SURG031", "a causal model learns its text; `label` belongs to a classification")

    def problem(self, code: str, message: str) -> SurgError:
        """An error at the data block of the spec."""
        place = self.data.place
        return fail(code, message, span_of(place, self.folder), notes=place_notes(place, self.folder))

    def file(self, path: str) -> DataFile:
        """A file that the spec names, relative to it."""
        return DataFile(path, self.folder, self.data.place)

    def read(self, file: DataFile) -> list[_Text]:
        """The usable rows of a file; rows without text are left out, with a warning. Raises SURG052 if none is left."""
        template = "{text}" if self.data.text is None else self.data.text
        texts: list[_Text] = []
        empty = 0
        for number, row in file.rows():
            text = PLACEHOLDER.sub(lambda match: _fill(file, number, row, match), template)  # noqa: B023
            label = None if self.data.label is None else _column(file, number, row, self.data.label)
            if not text.strip() or (self.data.label is not None and label in (None, "")):
                empty += 1
            else:
                texts.append(_Text(text, label, number, file))
        if not texts:
            reason = f"all {empty} rows are without text or label" if empty else "the file has no rows"
            raise file.fail("SURG052", f"no usable rows: {reason}")
        if empty:
            message = f"{file.name}: {empty} of {empty + len(texts)} rows have no text or no label and are left out"
            span = span_of(file.place, self.folder)
            self.warnings.append(Diagnostic("SURG057", message, span, severity="warning"))
        return texts

    def split(self, file: DataFile, rows: list[_Text]) -> tuple[list[_Text], list[_Text]]:
        """Rows to train on and held-out ones, chosen by the seed; each part keeps the file's order."""
        count = round(len(rows) * self.data.holdout)
        if not 0 < count < len(rows):
            message = f"holdout = {self.data.holdout} of {len(rows)} rows leaves {len(rows) - count} to train on"
            raise file.fail("SURG052", f"{message} and {count} to evaluate on")
        chosen = set(torch.randperm(len(rows), generator=seeded(self.plan.step.seed, -1))[:count].tolist())
        kept = [row for number, row in enumerate(rows) if number not in chosen]
        return kept, [row for number, row in enumerate(rows) if number in chosen]

    def label_names(self, file: DataFile, rows: list[_Text], known: Sequence[str]) -> tuple[str, ...]:
        """The labels' names in the order of their numbers; empty for causal models and for regression (one label)."""
        if self.causal or self.plan.model.labels == 1:
            return ()
        found = {_label(row) for row in rows}
        if known:
            if unknown := found - set(known):
                raise file.fail("SURG052", f"label `{min(unknown)}` is none that the run was trained with",
                                help=did_you_mean(min(unknown), known))  # fmt: skip
            return tuple(known)
        # Whole numbers sort as numbers, so that labels which are numbered already keep their order.
        numbers = all(re.fullmatch(r"-?\d{1,18}", name) for name in found)
        names = tuple(sorted(found, key=int) if numbers else sorted(found))
        expected = self.plan.model.labels
        if expected is not None and len(names) != expected:
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            help = f"write labels = {len(names)} in the model's task, or choose another label column"
            message = f"column `{self.data.label}` has {len(names)} labels, the model {expected}: {shown}"
            raise file.fail("SURG052", message, help=help)
        return names

    def examples(self, file: DataFile, rows: list[_Text], names: tuple[str, ...]) -> Examples:
        """Tokenise rows; text beyond `max_length` is cut."""
        tokens: list[array[int]] = []
        for start in range(0, len(rows), 1000):
            texts = [row.text for row in rows[start : start + 1000]]
            tokens += [array("i", ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        # The tokenizer cuts, not a slice: special tokens at the end of a text stay there.
        for number, ids in enumerate(tokens):
            if len(ids) > self.data.max_length:
                self.cut += 1
                shorter = self.tokenizer([rows[number].text], truncation=True, max_length=self.data.max_length)
                tokens[number] = array("i", shorter["input_ids"][0])
        for row, ids in zip(rows, tokens, strict=True):
            if not ids:
                raise row.file.fail("SURG052", "the model's tokenizer makes no token of this row's text", row.row)
        padding = self.tokenizer.pad_token_id
        if padding is None:  # such models never see padding: it is masked, and ignored by the loss
            padding = self.tokenizer.eos_token_id or 0
        return Examples(tuple(tokens), self.numbers(rows, names), padding)

    def numbers(self, rows: list[_Text], names: tuple[str, ...]) -> tuple[int, ...] | tuple[float, ...] | None:
        """The labels of rows: numbers of their names, the values themselves in a regression, None for causal models."""
        if self.causal:
            return None
        if names:
            index = {name: number for number, name in enumerate(names)}
            return tuple(index[_label(row)] for row in rows)
        return tuple(_value(row) for row in rows)


def _column(file: DataFile, number: int, row: Row, name: str) -> Any:
    if name not in row:
        columns = list(row)
        help = did_you_mean(name, columns)
        listed = ", ".join(columns[:40]) or "none"
        message = f"there is no column `{name}`; the columns are: {listed}"
        raise file.fail("SURG051", message, number, help if help and help.startswith("did") else None)
    return row[name]


def _fill(file: DataFile, number: int, row: Row, match: re.Match[str]) -> str:
    if match.group(0) in ("{{", "}}"):
        return match.group(0)[0]
    value = _column(file, number, row, match.group(1))
    if isinstance(value, (dict, list)):
        raise file.fail("SURG051", f"column `{match.group(1)}` holds a {type(value).__name__}, not text", number)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _label(row: _Text) -> str:
    if isinstance(row.label, (dict, list)):
        raise row.file.fail("SURG051", f"the label is a {type(row.label).__name__}, not a name or a number", row.row)
    return row.label if isinstance(row.label, str) else json.dumps(row.label)


def _value(row: _Text) -> float:
    try:
        value = float(row.label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise row.file.fail("SURG051", f"one label is a regression, and `{row.label}` is not a number", row.row)
    return value
