"""The figures of a run, computed once for the page and for `--format json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.compiler.diagnostics import SurgError
from surgery.compiler.plan import Plan
from surgery.compiler.skeleton import Skeleton
from surgery.runtime.best import Best, best_of
from surgery.runtime.models import load_model
from surgery.runtime.report.changes import Change, changes, changes_alone, reached
from surgery.runtime.report.metrics import Series, read_series
from surgery.runtime.run_folder import RunState, load_state


@dataclass(frozen=True)
class Report:
    """All that a report says; `unreached` is why the model's own weights are not known, empty where they are."""

    run: str
    plan: Plan
    spec: str
    step: int  # optimizer steps done at the last save
    weights_step: int  # and at that of the weights, which may be of the best evaluation
    steps: int | None  # of the whole run, where it is known
    series: dict[str, Series]
    changes: list[Change]
    unreached: str
    best: Best | None = None  # the best evaluation, where the spec asks for its state

    @property
    def logged(self) -> int:
        """Optimizer steps that wrote their numbers down: more than `step` where a run died between two saves."""
        return max((series.steps[-1] + 1 for series in self.series.values()), default=0)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: all steps are done, or evaluations were no better for long enough."""
        return (self.steps is not None and self.step >= self.steps) or (self.best is not None and self.best.over)

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON."""
        plan = self.plan
        return {
            "run": self.run, "spec": plan.file, "model": plan.model.name, "step": self.step, "steps": self.steps,
            "finished": self.finished, "best": self.best and self.best.record(), "weights_step": self.weights_step,
            "totals": plan.totals.model_dump(),
            "memory": None if plan.memory is None else plan.memory.model_dump(),
            "metrics": {name: {"steps": found.steps, "values": found.values} for name, found in self.series.items()},
            "unreached": self.unreached or None,
            "changes": [asdict(change) for change in self.changes],
        }  # fmt: skip


def gather(run: Path, kept: Path | None = None, *, allow_code: bool = False) -> Report:
    """Read a run folder and compute what its report says. Raises SURG054 where the folder is damaged.

    `kept` is the folder of the state whose weights are reported, such as that of the best evaluation; left out: the
    run itself, which has the last.
    """
    last = load_state(run)
    state = last if kept is None or kept == run else load_state(kept)
    series = read_series(run)
    lengths = [step.steps for step in last.plan.step_blocks]
    steps = last.extra.get("steps", None if None in lengths else sum(filter(None, lengths)))
    weights: dict[str, Tensor] = state.state["weights"]
    model, unreached = _model(state, allow_code)
    if model is None:
        found = changes_alone(state.plan, weights, state.step)
    else:
        found = changes(reached(state.plan, model, weights, state.step))
    best = best_of(last.plan.step, last.extra.get("best"))
    return Report(str(run), last.plan, last.spec, last.step, state.step, steps, series, found, unreached, best)


def _model(state: RunState, allow_code: bool) -> tuple[nn.Module | None, str]:
    """The run's model with its own weights, or why there is none."""
    plan = state.plan
    if plan.model.source == "given":
        return None, "the model was given in Python, and the spec names none"
    try:
        model = load_model(plan.model, state.folder, seed=plan.step.seed, allow_code=allow_code)
    except SurgError as error:
        return None, "; ".join(found.message for found in error.diagnostics)
    if Skeleton(model).fingerprint != plan.model.fingerprint:
        return None, f'the model "{plan.model.name}" is not the one that the run was begun with'
    return model, ""
