"""`report = tensorboard | wandb | trackio`: the rows of a run, followed elsewhere while it goes on.

A tracker is imported only when a spec asks for it. One that cannot begin is an error, before the first step; one that
fails later is given up with a warning: the run and its own `metrics.jsonl` go on.
"""

from __future__ import annotations

import sys
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from surgery.compiler.diagnostics import Diagnostic, SurgError, fail, render
from surgery.compiler.plan import Plan
from surgery.runtime.extras import needed
from surgery.runtime.places import place_notes, span_of

# The module that a tracker is, which is asked for before anything is loaded.
MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
SHOWN = {"loss": "train/loss", "penalty": "train/penalty", "lr": "train/lr", "gradient_norm": "train/gradient_norm"}


class Tracker(Protocol):
    """Where rows go."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, plan: Plan, run: Path, identity: str, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a crash left behind the save is hidden: those steps are taken again.
        self.writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=done)
        if not done:
            self.writer.add_text("spec", f"```\n{plan.spec}\n```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One point per value."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class _Service:
    """A run that a service keeps: `self.run` takes rows by step, and is finished."""

    run: Any

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row; a step that it has already is left as it is."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run there."""
        self.run.finish()


class Wandb(_Service):
    """A run of Weights & Biases, continued by its id."""

    def __init__(self, plan: Plan, run: Path, identity: str, done: int) -> None:
        import wandb

        assert plan.step.report is not None
        self.run = wandb.init(
            project=plan.step.report.project, dir=str(run), name=run.resolve().name, id=identity, resume="allow",
            config=_settings(plan),
        )  # fmt: skip


class Trackio(_Service):
    """A run of Trackio, continued by its name."""

    def __init__(self, plan: Plan, run: Path, identity: str, done: int) -> None:
        import trackio

        assert plan.step.report is not None
        self.run = trackio.init(
            project=plan.step.report.project or "surgery", name=f"{run.resolve().name}-{identity}", resume="allow",
            config=_settings(plan), embed=False,
        )  # fmt: skip


KINDS: dict[str, Callable[[Plan, Path, str, int], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio,
}  # fmt: skip


class Report:
    """The tracker of a run, or none; nothing that it does ends the run."""

    def __init__(self, name: str = "", tracker: Tracker | None = None) -> None:
        self.name, self.tracker = name, tracker

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics."""
        values = {SHOWN[name]: value for name, value in row.items() if name in SHOWN}
        values |= {f"eval/{name.removeprefix('eval_')}": row[name] for name in row if name.startswith("eval_")}
        if row["seconds"] > 0:
            values["train/tokens_per_second"] = row["tokens"] / row["seconds"]
        self._do(lambda tracker: tracker.log(row["step"], values))

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._do(lambda tracker: tracker.close())

    def _do(self, what: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            with redirect_stdout(sys.stderr):  # standard output is the verb's
                what(self.tracker)
        except Exception as error:  # a network, a disk, the tracker itself
            self.tracker = None
            message = f"{self.name} failed and is given up: {_said(error)}"
            help = "the run goes on; metrics.jsonl has every row"
            warnings.warn(render(Diagnostic("SURG071", message, help=help, severity="warning")), stacklevel=2)


def check_installed(plan: Plan, folder: Path) -> None:
    """SURG063 where the tracker of a plan is not installed; `folder` is the spec's."""
    report = plan.step.report
    if report is not None:
        span = span_of(report.place, folder)
        needed(MODULES[report.name], report.name, f"`report = {report.name}`", span)


def new_identity() -> str:
    """What a run is called where names need not be unique."""
    return uuid.uuid4().hex[:8]


def open_report(plan: Plan, folder: Path, run: Path, identity: str, done: int) -> Report:
    """The tracker that a plan asks for, `done` steps into the run; SURG071 where it does not begin."""
    report = plan.step.report
    if report is None:
        return Report()
    check_installed(plan, folder)
    try:
        with redirect_stdout(sys.stderr):
            return Report(report.name, KINDS[report.name](plan, run, identity, done))
    except Exception as error:
        raise _not_begun(plan, folder, error) from error


def _not_begun(plan: Plan, folder: Path, error: Exception) -> SurgError:
    report = plan.step.report
    assert report is not None
    notes = place_notes(report.place, folder)
    return fail("SURG071", f"{report.name} does not begin: {_said(error)}", span_of(report.place, folder), notes=notes)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _settings(plan: Plan) -> dict[str, Any]:
    """What a tracker shows beside the curves."""
    without = {"report", "recompute", "number", "frozen", "rates"}
    step, *later = (block.model_dump(exclude=without, exclude_none=True) for block in plan.step_blocks)
    more = {f"block_{number + 2}": block for number, block in enumerate(later)}
    return {"spec": plan.spec, "model": plan.model.name, "trainable": plan.totals.trainable, **step, **more}
