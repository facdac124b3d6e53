"""The loop around the training step: batches in, a run folder out, resumable to the bit after any interruption."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from surgery.compiler.diagnostics import Note, fail
from surgery.compiler.plan import StepPlan
from surgery.runtime import distributed
from surgery.runtime.best import BEST, Best, best_of
from surgery.runtime.data import Data, block_of, streams_of
from surgery.runtime.progress import Progress
from surgery.runtime.records import Metrics, Rows, Steppable, Taken, due
from surgery.runtime.run_folder import SAVES, Savable, all_finite, keep_save, load_state, save_step
from surgery.runtime.trackers import Report, new_identity, open_report


class Trainable(Savable, Steppable, Protocol):
    """What the loop needs of a training step."""

    @property
    def scope(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done, of how many, the last loss and evaluation, seconds of this part of it.

    `best` is what the spec asks to keep; `stopped` says that the run ended since nothing was better for long enough.
    """

    done: int
    steps: int
    loss: float | None
    evaluation: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    best: Best | None = None
    interrupted: bool = False

    @property
    def stopped(self) -> bool:
        """Whether it ended before its last step because the spec says so."""
        return self.best is not None and self.best.over and not self.interrupted


def train(
    step: Trainable,
    data: Data,
    run: Path | None,
    *,
    resume: bool = False,
    progress: bool = True,
    log: Callable[[str], None] | None = None,
) -> Outcome:
    """Take the optimizer steps from `step.step` to `step.steps` (the caller sets `step.lengths`).

    `run` is the run folder (None: nothing is written). `progress` shows a bar on standard error, where that is a
    terminal; `log` is called with one line per logged step. SIGINT ends the run after the present step, saved. Raises
    SURG053 at a loss that is not finite (nothing of that step is kept), SURG054 when resuming on other data, SURG063
    and SURG071 where the spec's tracker does not begin.

    All processes of a run call it alike and take every step together; the first one writes, logs and tracks.
    """
    plan = step.plan.step
    blocks = step.plan.step_blocks
    streams = streams_of(step.plan, data.train, step.lengths, distributed.number(), distributed.processes())
    ends = set(accumulate(step.lengths))
    extra: dict[str, Any] = {
        "steps": step.steps, "lengths": list(step.lengths), "labels": list(data.names), "data": data.fingerprint(),
        "scope": step.scope,
    }  # fmt: skip
    _check_alike(extra["data"])
    before = _resumed(run, extra) if resume and run is not None else {}
    distributed.wait()  # until all have read the folder
    first = distributed.number() == 0
    best = best_of(plan, before.get("best"))
    if best is not None and data.held_out is None:
        raise fail("SURG052", "the best state is that of an evaluation, and no rows are held out for one")
    report = Report()
    if run is not None and plan.report is not None:
        extra["identity"] = before.get("identity") or new_identity()
    if first and run is not None and plan.report is not None:
        report = open_report(step.plan, step.folder, run, extra["identity"], step.step)
    folder = None if run is None else _Folder(step, run, extra, best)
    metrics = Metrics(run if first else None, step.step)
    began = time.perf_counter()
    with report, metrics, _interruption() as asked, Progress(step.steps, step.step, progress and first) as bar:
        if folder is not None:
            folder.begin(resume)
        rows = Rows(
            step, metrics, report, bar, log if first else None,
            lambda loss, number: _not_finite(step, loss, number, folder),
        )  # fmt: skip
        while step.step < step.steps and not distributed.anywhere(asked.is_set()) and not (best and best.over):
            block = block_of(step.step, step.lengths)
            taken, settings = Taken(step, streams[block], blocks[block]), blocks[block]
            done = step.step
            if done == taken.number:  # skipped: float16 gradients overflowed; the same batch again, at a smaller scale
                rows.read(taken)
                continue
            rows.settle()
            evaluates = data.held_out is not None and (done in ends or due(settings.evaluate, done))
            saves = folder is not None and due(settings.save, done) and done < step.steps
            rows.unread = taken
            # While a GPU computes a step, the host prepares the next one and only then reads the loss of the last.
            if taken.result.loss.is_cuda and not evaluates and not saves:
                continue
            rows.settle(data.held_out if evaluates else None)
            if evaluates and best is not None and best.better(rows.evaluation, done) and folder is not None:
                folder.save_best()
            if saves and folder is not None:
                metrics.sync()
                folder.save(keeps=True)
        rows.settle()
        metrics.sync()
        if folder is not None:
            folder.save()
    seconds = time.perf_counter() - began
    stopped = best is not None and best.over
    return Outcome(
        step.step, step.steps, rows.loss, rows.evaluation, seconds, best,
        interrupted=step.step < step.steps and not stopped,
    )  # fmt: skip


class _Folder:
    """The run folder, and what of it is kept beside the last state. The first process writes; all call it."""

    def __init__(self, step: Trainable, run: Path, extra: dict[str, Any], best: Best | None) -> None:
        self.step, self.run, self.extra, self.best = step, run, extra, best

    def begin(self, resume: bool) -> None:
        """The start of a run, without what another has left; or what a crash behind the last save has left undone."""
        if not resume:
            for name in (BEST, SAVES) if distributed.number() == 0 else ():
                shutil.rmtree(self.run / name, ignore_errors=True)
            self.save()
        elif due(self._settings.save, self.step.step) and 0 < self.step.step < self.step.steps:
            self._keep()

    @property
    def _settings(self) -> StepPlan:
        """Those of the last step that was taken."""
        return self.step.plan.step_blocks[block_of(self.step.step - 1, self.step.lengths)]

    def save(self, keeps: bool = False) -> None:
        """The state as it is; `keeps` it beside later ones, if the spec says so."""
        save_step(self.step, self.run, self._extra())
        if keeps:
            self._keep()

    def save_best(self) -> None:
        """The state as the best so far: a run folder of its own."""
        save_step(self.step, self.run / BEST, self._extra())

    def _keep(self) -> None:
        if (keep := self._settings.keep) is not None and distributed.number() == 0:
            keep_save(self.run, self.step.step, keep)

    def _extra(self) -> dict[str, Any]:
        return self.extra if self.best is None else {**self.extra, "best": self.best.record()}


def _not_finite(step: Trainable, loss: float, number: int, folder: _Folder | None) -> Exception:
    """Keep the state before the failed step if it is good, else leave the last save as it is; then the error."""
    notes = []
    # A step with such a loss changes nothing, unless the numbers were broken by the step before it.
    if folder is not None and step.step == number and not _broken(step):
        folder.save()
    if folder is not None and distributed.number() == 0:
        kept = load_state(folder.run, mapped=True).step
        notes.append(Note(f"`{folder.run}` holds the last good state, after {kept} steps"))
    help = "lower lr, add warmup or clip, or look at the rows of this batch; `surgery train --resume` starts from there"
    return fail("SURG053", f"the loss is {loss} at step {number} (steps count from 0)", notes=notes, help=help)


def _broken(step: Trainable) -> bool:
    return distributed.anywhere(not all_finite(step.state_dict()["weights"]))


def _check_alike(data: str) -> None:
    """Each process reads the rows itself, and takes its part of them."""
    if len(set(distributed.gathered(data))) > 1:
        help = "give all machines the same files; a split of the hub is pinned by its revision"
        raise fail("SURG054", "the processes of this run have read different rows", help=help)


def _resumed(run: Path, extra: dict[str, Any]) -> dict[str, Any]:
    """What the run folder keeps beside its state, if it was begun with the same data."""
    before = load_state(run, mapped=True).extra
    kinds = {
        "data": "other rows", "labels": "other labels", "steps": "another number of steps",
        "lengths": "blocks of other lengths", "scope": "another scope",
    }  # fmt: skip
    for name, what in kinds.items():
        if name in before and before[name] != extra[name]:
            message = f"`{run}` was begun with {what} than it is resumed with"
            raise fail("SURG054", message, help="resume with the data of the run, or train into a new folder")
    return before


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
