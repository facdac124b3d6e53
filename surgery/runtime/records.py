"""What is known of each step: written to the run folder, shown, logged and tracked, in order, once its loss is read."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from surgery.compiler.plan import Plan, StepPlan
from surgery.runtime.data import Examples, Stream
from surgery.runtime.evaluate import Evaluable, evaluate
from surgery.runtime.progress import Progress, line
from surgery.runtime.run_folder import METRICS
from surgery.runtime.trackers import Report

Row = dict[str, Any]


class Steppable(Evaluable, Protocol):
    """What is read of a training step."""

    step: int  # optimizer steps done

    @property
    def lengths(self) -> tuple[int, ...]:
        """Optimizer steps of each `step` block."""

    @property
    def steps(self) -> int: ...  # noqa: D102

    @property
    def plan(self) -> Plan: ...  # noqa: D102

    @property
    def learning_rate(self) -> float: ...  # noqa: D102

    def __call__(self, batch: dict[str, Tensor]) -> Any: ...  # noqa: D102


class Taken:
    """A step that was taken by the settings of its block, with a loss that nobody has read yet."""

    def __init__(self, step: Steppable, stream: Stream, settings: StepPlan) -> None:
        self.number, self.rate, self.settings = step.step, step.learning_rate, settings
        self.tokens = sum(map(stream.examples.length, stream.rows(self.number)))
        batch = stream.batch(self.number)
        self.began = time.perf_counter()
        self.result = step(batch)


class Rows:
    """The rows of metrics. `failed` says what to raise for a loss that is not finite."""

    def __init__(
        self, step: Steppable, metrics: Metrics, report: Report, bar: Progress, log: Callable[[str], None] | None,
        failed: Callable[[float, int], Exception],
    ) -> None:  # fmt: skip
        self.step, self.metrics, self.report, self.bar, self.log = step, metrics, report, bar, log
        self.failed = failed
        self.unread: Taken | None = None
        self.ended = 0.0  # when the last loss was there
        self.loss: float | None = None
        self.evaluation: dict[str, float] = {}

    def settle(self, held_out: Examples | None = None) -> None:
        """Read the step that is unread, if one is, and evaluate on `held_out`."""
        if self.unread is None:
            return
        taken, self.unread = self.unread, None
        row = self.read(taken)
        if held_out is not None:
            self.evaluation = evaluate(self.step, held_out)
            row |= {f"eval_{name}": value for name, value in self.evaluation.items() if name != "rows"}
        self.metrics.write(row)
        self.bar.advance(row)
        done = taken.number + 1
        if due(taken.settings.log, done) or done == self.step.steps or held_out:
            self.report.row(row)
            if self.log is not None:
                self.log(line(row))
        self.loss = row["loss"]

    def read(self, taken: Taken) -> Row:
        """The row of a step."""
        loss, penalty = float(taken.result.loss), float(taken.result.penalty)
        if not math.isfinite(loss + penalty):
            raise self.failed(loss + penalty, taken.number)
        now = time.perf_counter()
        seconds, self.ended = now - max(taken.began, self.ended), now
        row: Row = {"step": taken.number, "loss": loss, "lr": taken.rate, "seconds": round(seconds, 6)}
        row["tokens"] = taken.tokens
        if (norm := taken.result.gradient_norm) is not None:
            row["gradient_norm"] = float(norm)
        if penalty:
            row["penalty"] = penalty
        return row


class Metrics:
    """`metrics.jsonl`: one row per step, each flushed; rows behind the save that a run is resumed from are cut off."""

    def __init__(self, run: Path | None, done: int) -> None:
        self.path = None if run is None else run / METRICS
        self.file: Any = None
        self.done = done

    def __enter__(self) -> Metrics:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                file.seek(0)
                file.truncate(sum(len(row) for row in _rows_before(file.readlines(), self.done)))
            self.file = open(self.path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed in __exit__)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, row: Row) -> None:
        """Append a row; a score that is no number, which JSON has no form for, is null."""
        if self.file is not None:
            plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
            self.file.write(json.dumps(plain) + "\n")
            self.file.flush()

    def sync(self) -> None:
        """Have the rows on the disk before a save says that their steps are done."""
        if self.file is not None:
            os.fsync(self.file.fileno())


def _rows_before(rows: list[bytes], done: int) -> Iterator[bytes]:
    for row in rows:
        try:
            if not row.endswith(b"\n") or json.loads(row)["step"] >= done:
                return
        except (ValueError, KeyError, TypeError):
            return  # cut off by a crash
        yield row


def due(interval: int | None, done: int) -> bool:
    """Whether something happens after so many steps."""
    return interval is not None and done % interval == 0
