"""The rows of a plan's files as tokens: which files, which rows, and every row that is left out counted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from surgery.compiler.diagnostics import Diagnostic, SurgError, did_you_mean, fail
from surgery.compiler.plan import DataPlan, Plan
from surgery.runtime.data.chat import ChatForm
from surgery.runtime.data.examples import Examples
from surgery.runtime.data.fields import Entry, brief
from surgery.runtime.data.files import SUFFIXES, DataFile, Rows
from surgery.runtime.data.forms import CompletionForm, Form, TextForm, Tokens
from surgery.runtime.data.hub import DataSet
from surgery.runtime.data.stream import seeded
from surgery.runtime.places import place_notes, span_of

AT_ONCE = 200  # rows: no more text is in memory than that of so many
T = TypeVar("T")


@dataclass
class Tally:
    """How many rows, and which was the first."""

    count: int = 0
    first: Entry | None = None

    def add(self, entry: Entry) -> None:
        """Count a row."""
        self.count += 1
        self.first = self.first or entry


@dataclass
class Documents:
    """The usable rows of a source, and those that are not."""

    source: Rows
    tokens: list[Tokens] = field(default_factory=list)
    labels: list[str | float] = field(default_factory=list)
    read: int = 0
    empty: Tally = field(default_factory=Tally)  # without text, without a label
    silent: Tally = field(default_factory=Tally)  # without a token to learn
    long: Tally = field(default_factory=Tally)  # longer than max_length
    cut_off: Tally = field(default_factory=Tally)  # of those, whose tokens to learn were all cut off
    longest: int = 0  # tokens of a row, before any is cut
    whole: bool = True  # whether these are all rows
    first: int = 0  # the number of the first usable row

    def some(self, numbers: Iterable[int]) -> Documents:
        """Some of the usable rows."""
        chosen = list(numbers)
        labels = [self.labels[number] for number in chosen] if self.labels else []
        tokens = [self.tokens[number] for number in chosen]
        return Documents(self.source, tokens, labels, whole=self.whole)


class Reader:
    """Reads the files of one plan; with `limit` so many rows of each, and of the hub no more than those."""

    def __init__(self, plan: Plan, folder: Path, tokenizer: Any, limit: int | None = None) -> None:
        if plan.data is None:
            raise fail("SURG050", "the spec names no data", help='add a block: data "rows.jsonl" { text = "{text}" }')
        self.data: DataPlan = plan.data
        self.plan, self.folder, self.tokenizer, self.limit = plan, folder, tokenizer, limit
        self.cut = self.dropped = 0
        self.warnings: list[Diagnostic] = []
        self.causal = plan.model.task == "causal_lm"
        if not self.causal and plan.model.task != "sequence_classification":
            task = "a model without a task" if plan.model.task is None else f"the task {plan.model.task}"
            raise self.problem("SURG008", f"a data block for {task} is not read yet")
        self.form = self._form()

    def _form(self) -> Form:
        if self.data.messages is not None:
            chat = ChatForm(self.data, self.tokenizer, self.problem)
            self.warnings += chat.warnings(self._warning)
            return chat
        if self.data.prompt is not None:
            return CompletionForm(self.data, self.tokenizer)
        return TextForm(self.data, self.tokenizer, self.causal)

    def problem(self, code: str, message: str, help: str | None = None) -> SurgError:
        """An error at the data block of the spec."""
        place = self.data.place
        return fail(code, message, span_of(place, self.folder), notes=place_notes(place, self.folder), help=help)

    def _warning(self, code: str, message: str, help: str | None = None) -> Diagnostic:
        return Diagnostic(code, message, span_of(self.data.place, self.folder), severity="warning", help=help)

    # --- which rows ---

    def training(self) -> Rows:
        """The rows that the spec names."""
        return self.source(self.data.path, self.folder)

    def evaluation(self) -> Rows | None:
        """The rows of their own that the spec evaluates on."""
        if self.data.eval is not None:
            return self.source(self.data.eval, self.folder)
        return None if self.data.eval_split is None else self.source(self.data.path, self.folder, self.data.eval_split)

    def source(self, path: str | Path, folder: Path, split: str | None = None) -> Rows:
        """A file by its name, else a folder or a dataset of the hub."""
        place, split = self.data.place if folder == self.folder else None, split or self.data.split
        if is_dataset(str(path), folder):
            return DataSet(
                path, folder, place, split=split or "train", subset=self.data.subset, streamed=self.limit is not None
            )
        if split or self.data.subset:
            raise self.problem("SURG004", f"{path} is a file, and only a dataset has a `split` or a `subset`")
        return DataFile(path, folder, place)

    # --- rows to tokens ---

    def documents(self, source: Rows) -> Documents:
        """The usable rows of a source as tokens; those that are left out are counted, and said.

        Raises SURG052 if none is left, SURG059 where the settings refuse a row.
        """
        found = Documents(source)
        for chunk in _chunks(islice(source.rows(), self.limit), AT_ONCE):
            self._encode(found, [Entry(source, number, row) for number, row in chunk])
        found.whole = self.limit is None or found.read < self.limit
        self._refuse(found)
        self._say(found)
        return found

    def _encode(self, found: Documents, entries: list[Entry]) -> None:
        taken = []
        for entry in entries:
            read = self.form.read(entry)
            label = "" if self.data.label is None else entry.label(self.data.label)
            if read is None or label is None:
                found.empty.add(entry)
            else:
                taken.append((entry, read, label))
        found.read += len(entries)
        if not taken:
            return
        encoded = self.form.encode([(entry, read) for entry, read, _ in taken])
        for (entry, read, label), tokens in zip(taken, encoded, strict=True):
            if not tokens.ids:
                raise entry.fail("SURG052", "the model's tokenizer makes no token of this row's text")
            found.longest = max(found.longest, len(tokens.ids))
            if too_long := len(tokens.ids) > self.data.max_length:
                found.long.add(entry)
                if self.data.too_long != "truncate":
                    continue
                tokens = self.form.cut(read, tokens, self.data.max_length)
            if self.causal and not tokens.teaches:
                (found.cut_off if too_long else found.silent).add(entry)
                continue
            found.first = found.first or entry.number
            found.tokens.append(tokens)
            if self.data.label is not None:
                found.labels.append(entry.value(label) if self.plan.model.labels == 1 else label)

    def _reasons(self, found: Documents) -> list[tuple[Tally, str]]:
        """Rows that are left out, with why."""
        limit, loss = self.data.max_length, self.data.loss
        return [
            (found.empty, f"have no {self.form.lacks}"),
            (found.silent, f"have no token that `loss = {loss}` learns"),
            (found.cut_off, f"have no token left that `loss = {loss}` learns after they are cut to {limit} tokens"),
        ]

    def _refuse(self, found: Documents) -> None:
        limit = self.data.max_length
        if self.data.too_long == "error" and found.long.first:
            message = (
                f"{found.long.count:,} of {found.read:,} rows are longer than max_length = {limit}, this is the first"
            )
            help = (
                f"the longest has {found.longest:,} tokens; `too_long = drop` or `truncate` says what to do with them"
            )
            raise found.long.first.fail("SURG059", message, help)
        reasons = self._reasons(found)
        for tally, why in reasons if self.data.empty == "error" else ():
            if tally.first:
                message = f"{tally.count:,} of {found.read:,} rows {why}, this is the first"
                raise tally.first.fail("SURG059", message, "`empty = drop` leaves such rows out, and says so")
        if not found.tokens:
            all_reasons = [*reasons, (found.long, f"are longer than max_length = {limit}")]
            said = [f"{tally.count:,} of {found.read:,} {why}" for tally, why in all_reasons if tally.count]
            raise found.source.fail("SURG052", f"no usable rows: {', '.join(said) or 'there are none at all'}")

    def _say(self, found: Documents) -> None:
        for tally, why in self._reasons(found):
            if tally.first:
                message = f"{found.source.name}: {tally.count:,} of {found.read:,} rows {why} and are left out"
                self.warnings.append(self._warning("SURG057", f"{message}; the first is row {tally.first.number}"))
        if self.data.too_long == "drop":
            self.dropped += found.long.count
        else:
            self.cut += found.long.count - found.cut_off.count

    def split(self, rows: Documents) -> tuple[Documents, Documents]:
        """Rows to train on and held-out ones, chosen by the seed; each part keeps the file's order."""
        total = len(rows.tokens)
        count = round(total * self.data.holdout)
        if not 0 < count < total:
            message = f"holdout = {self.data.holdout} of {total} rows leaves {total - count} to train on"
            raise rows.source.fail("SURG052", f"{message} and {count} to evaluate on")
        chosen = set(torch.randperm(total, generator=seeded(self.plan.step.seed, -1))[:count].tolist())
        kept = rows.some(number for number in range(total) if number not in chosen)
        return kept, rows.some(number for number in range(total) if number in chosen)

    # --- labels ---

    def label_names(self, parts: Sequence[Documents], known: Sequence[str]) -> tuple[str, ...]:
        """The labels' names in the order of their numbers; empty for causal models and for regression (one label)."""
        if self.causal or self.plan.model.labels == 1:
            return ()
        file = parts[0].source
        found = {str(label) for part in parts for label in part.labels}
        if known:
            if unknown := found - set(known):
                raise file.fail("SURG052", f"label `{brief(min(unknown))}` is none that the run was trained with",
                                help=did_you_mean(min(unknown), known))  # fmt: skip
            return tuple(known)
        # Whole numbers sort as numbers, so that labels which are numbered already keep their order.
        numbers = all(re.fullmatch(r"-?\d{1,18}", name) for name in found)
        names = tuple(sorted(found, key=int) if numbers else sorted(found))
        expected = self.plan.model.labels
        some = not all(part.whole for part in parts)  # which may lack a few of them
        if expected is not None and (len(names) > expected if some else len(names) != expected):
            shown = ", ".join(brief(name) for name in names[:12]) + (", ..." if len(names) > 12 else "")
            help = f"write labels = {len(names)} in the model's task, or choose another label column"
            message = f"column `{self.data.label}` has {len(names)} labels, the model {expected}: {shown}"
            raise file.fail("SURG052", message, help=help)
        return names

    def examples(self, rows: Documents, names: tuple[str, ...]) -> Examples:
        """Rows as what batches are made of."""
        padding = self.tokenizer.pad_token_id
        if padding is None:  # such models never see padding: it is masked, and ignored by the loss
            padding = self.tokenizer.eos_token_id or 0
        learned = [tokens.learned for tokens in rows.tokens if tokens.learned is not None]
        index = {name: number for number, name in enumerate(names)}
        labels: Any = tuple(index[str(label)] if names else label for label in rows.labels)
        ids = tuple(tokens.ids for tokens in rows.tokens)
        return Examples(ids, None if self.causal else labels, padding, tuple(learned) if learned else None)


def is_dataset(name: str, folder: Path) -> bool:
    """Whether a name is a dataset's: a folder that is there, or an id of the hub, `name` or `org/name`."""
    if name.endswith(SUFFIXES) or (folder / name).is_file():
        return False
    is_file = Path(name).suffix[1:].isalpha()  # "rows.txt"; a version is no suffix: "org/name-v1.5"
    return (folder / name).is_dir() or (not is_file and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None)


def _chunks(values: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(islice(values, size)):
        yield chunk
