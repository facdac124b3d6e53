"""The loop around the training step: batches in, a run folder out, resumable to the bit after any interruption."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from torch import Tensor

from surgery.compiler.diagnostics import Note, fail
from surgery.runtime.data import Data, Examples, Stream
from surgery.runtime.evaluate import Evaluable, evaluate
from surgery.runtime.progress import Progress, line
from surgery.runtime.run_folder import METRICS, Savable, all_finite, keep_save, load_state, save_step

Row = dict[str, Any]


class Trainable(Savable, Evaluable, Protocol):
    """What the loop needs of a training step."""

    step: int  # optimizer steps done
    steps: int  # optimizer steps of the whole run

    @property
    def learning_rate(self) -> float: ...  # noqa: D102

    def __call__(self, batch: dict[str, Tensor]) -> Any: ...  # noqa: D102


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done, of how many, the last loss and evaluation, seconds of this part of it."""

    done: int
    steps: int
    loss: float | None
    evaluation: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False


def train(
    step: Trainable,
    data: Data,
    run: Path | None,
    *,
    resume: bool = False,
    progress: bool = True,
    log: Callable[[str], None] | None = None,
) -> Outcome:
    """Take the optimizer steps from `step.step` to `step.steps` (both set by the caller).

    `run` is the run folder (None: nothing is written). `progress` shows a bar on standard error, where that is a
    terminal; `log` is called with one line per logged step. SIGINT ends the run after the present step, saved. Raises
    SURG053 at a loss that is not finite (nothing of that step is kept) and SURG054 when resuming on other data.
    """
    plan = step.plan.step
    stream = Stream(data.train, plan.batch, plan.seed)
    extra = {"steps": step.steps, "labels": list(data.names), "data": data.fingerprint()}
    if resume and run is not None:
        _check_resumed(run, extra)
    metrics = _Metrics(run, step.step)
    if run is not None and not resume:
        save_step(step, run, extra)
    began = time.perf_counter()
    with metrics, _interruption() as interrupted, Progress(step.steps, step.step, progress) as bar:
        rows = _Rows(step, run, extra, metrics, bar, log)
        while step.step < step.steps and not interrupted.is_set():
            taken = _Taken(step, stream)
            done = step.step
            if done == taken.number:  # skipped: float16 gradients overflowed; the same batch again, at a smaller scale
                rows.read(taken)
                continue
            rows.settle()
            evaluates = data.held_out is not None and (done == step.steps or _due(plan.evaluate, done))
            saves = run is not None and _due(plan.save, done) and done < step.steps
            rows.unread = taken
            # While a GPU computes a step, the host prepares the next one and only then reads the loss of the last.
            if taken.result.loss.is_cuda and not evaluates and not saves:
                continue
            rows.settle(data.held_out if evaluates else None)
            if saves and run is not None:
                metrics.sync()
                save_step(step, run, extra)
                if plan.keep is not None:
                    keep_save(run, done, plan.keep)
        rows.settle()
        metrics.sync()
        if run is not None:
            save_step(step, run, extra)
    seconds = time.perf_counter() - began
    return Outcome(step.step, step.steps, rows.loss, rows.evaluation, seconds, interrupted=step.step < step.steps)


class _Taken:
    """A step that was taken, with a loss that nobody has read yet."""

    def __init__(self, step: Trainable, stream: Stream) -> None:
        self.number, self.rate = step.step, step.learning_rate
        batch = stream.batch(self.number)
        self.began = time.perf_counter()
        self.result = step(batch)


class _Rows:
    """What is known of each step: written, shown and logged in order, as soon as its loss is read."""

    def __init__(
        self, step: Trainable, run: Path | None, extra: dict[str, Any], metrics: _Metrics, bar: Progress,
        log: Callable[[str], None] | None,
    ) -> None:  # fmt: skip
        self.step, self.run, self.extra, self.metrics, self.bar, self.log = step, run, extra, metrics, bar, log
        self.unread: _Taken | None = None
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
        if self.log is not None and (_due(self.step.plan.step.log, done) or done == self.step.steps or held_out):
            self.log(line(row))
        self.loss = row["loss"]

    def read(self, taken: _Taken) -> Row:
        """The row of a step; SURG053 if its loss is not finite."""
        loss = float(taken.result.loss)
        if not math.isfinite(loss):
            raise _not_finite(self.step, loss, taken.number, self.run, self.extra)
        now = time.perf_counter()
        seconds, self.ended = now - max(taken.began, self.ended), now
        row: Row = {"step": taken.number, "loss": loss, "lr": taken.rate, "seconds": round(seconds, 6)}
        if penalty := float(taken.result.penalty):
            row["penalty"] = penalty
        return row


def _not_finite(step: Trainable, loss: float, number: int, run: Path | None, extra: dict[str, Any]) -> Exception:
    """Keep the state before the failed step if it is good, else leave the last save as it is; then the error."""
    notes = []
    if run is not None:
        # A step with such a loss changes nothing, unless the numbers were broken by the step before it.
        if step.step == number and all_finite(step.state_dict()["weights"]):
            save_step(step, run, extra)
        notes.append(Note(f"`{run}` holds the last good state, after {load_state(run).step} steps"))
    help = "lower lr, add warmup or clip, or look at the rows of this batch; `surgery train --resume` starts from there"
    return fail("SURG053", f"the loss is {loss} at step {number} (steps count from 0)", notes=notes, help=help)


def _due(interval: int | None, done: int) -> bool:
    return interval is not None and done % interval == 0


def _check_resumed(run: Path, extra: dict[str, Any]) -> None:
    before = load_state(run).extra
    for name, what in (("data", "other rows"), ("labels", "other labels"), ("steps", "another number of steps")):
        if name in before and before[name] != extra[name]:
            message = f"`{run}` was begun with {what} than it is resumed with"
            raise fail("SURG054", message, help="resume with the data of the run, or train into a new folder")


class _Metrics:
    """`metrics.jsonl`: one row per step, each flushed; rows behind the save that a run is resumed from are cut off."""

    def __init__(self, run: Path | None, done: int) -> None:
        self.path = None if run is None else run / METRICS
        self.file: Any = None
        self.done = done

    def __enter__(self) -> _Metrics:
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
        """Append a row."""
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
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


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that SIGINT (Ctrl-C) or SIGTERM sets; a second one ends at once, with the last save left as it is."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
