"""The best state of a run by a score of its evaluations, and when the run ends because none is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surgery.compiler.diagnostics import fail
from surgery.compiler.plan import StepPlan

BEST = "best"  # the folder in the run folder
SMALLER_IS_BETTER = ("loss", "perplexity")


@dataclass
class Best:
    """The best value of a score so far, after how many steps it was there, and how many evaluations came since."""

    score: str
    patience: int | None = None
    value: float | None = None
    steps: int = 0
    since: int = 0

    @property
    def over(self) -> bool:
        """Whether as many evaluations as the spec waits for were no better."""
        return self.patience is not None and self.since >= self.patience

    def better(self, evaluation: Mapping[str, float], steps: int) -> bool:
        """Take an evaluation into account; whether it is the best so far, which NaN never is."""
        if self.score not in evaluation:
            known = ", ".join(name for name in evaluation if name != "rows")
            raise fail("SURG031", f"an evaluation of this model says no {self.score}", help=f"there are: {known}")
        found = evaluation[self.score]
        sign = -1 if self.score in SMALLER_IS_BETTER else 1
        if found == found and (self.value is None or sign * found > sign * self.value):
            self.value, self.steps, self.since = found, steps, 0
            return True
        self.since += 1
        return False

    def record(self) -> dict[str, Any]:
        """What the run folder keeps of it."""
        return asdict(self)


def best_of(plan: StepPlan, kept: Mapping[str, Any] | None) -> Best | None:
    """What a plan asks to keep, as an earlier part of the run has `kept` it; None if it asks for nothing."""
    if plan.best is None:
        return None
    return Best(**kept) if kept else Best(plan.best, plan.stop)
