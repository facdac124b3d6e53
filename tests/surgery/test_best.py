"""The best state of a run, and a run that ends since nothing was better: the same whatever interrupts it."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.compiler.diagnostics import SurgError
from surgery.runtime.best import Best
from surgery.runtime.run_folder import load_state
from surgery.runtime.train import Outcome, train
from tests.loop import FakeStep, data, losses

SCORES = (0.9, 0.7, 0.8, 0.6, 0.6, 0.7, 0.61, 0.2, 0.1)  # of the evaluations, the last ones never reached


class Scripted(FakeStep):
    """Its evaluations say what the test wants, by the number of steps done."""

    def __init__(self, folder: Path, scores: Sequence[float] = SCORES, **settings: Any) -> None:
        super().__init__(folder, steps=2 * len(scores), **{"evaluate": 2, **settings})
        self.scores = scores

    def evaluate(self, batch: dict[str, Tensor]) -> Any:
        count = len(batch["labels"])
        loss = torch.tensor(self.scores[self.step // 2 - 1], dtype=torch.float64) * count
        return SimpleNamespace(loss=loss, count=torch.tensor(count), output=None)


def run(step: FakeStep, folder: Path, **options: Any) -> Outcome:
    return train(step, data(), folder, progress=False, **options)


def test_a_run_ends_when_no_evaluation_is_better(tmp_path: Path) -> None:
    outcome = run(Scripted(tmp_path, best="loss", stop=3), tmp_path / "run")
    assert outcome.stopped and not outcome.interrupted and outcome.done == 14  # 0.6, then 0.6, 0.7, 0.61
    assert outcome.best == Best("loss", 3, 0.6, 8, 3)
    assert (load_state(tmp_path / "run").step, load_state(tmp_path / "run" / "best").step) == (14, 8)
    step = Scripted(tmp_path, best="loss", stop=3)
    step.load_state_dict(load_state(tmp_path / "run").state)
    again = run(step, tmp_path / "run", resume=True)
    assert again.done == 14 and again.stopped and len(losses(tmp_path / "run")) == 14


def test_the_best_state_is_that_of_its_evaluation(tmp_path: Path) -> None:
    outcome = run(Scripted(tmp_path, best="loss"), tmp_path / "run")
    assert outcome.done == 18 and not outcome.stopped and outcome.best == Best("loss", None, 0.1, 18, 0)
    run(Scripted(tmp_path, SCORES[:7], best="loss"), tmp_path / "other")
    alone = Scripted(tmp_path)
    alone.steps = 8
    run(alone, tmp_path / "alone")
    kept = load_state(tmp_path / "other" / "best")
    assert kept.step == 8 and torch.equal(kept.state["weights"]["w"], alone.weight)
    assert kept.folder == tmp_path and kept.extra["best"]["value"] == 0.6


@pytest.mark.parametrize("stop", [2, 7, 8, 9, 11, 13])
def test_an_interrupted_run_ends_and_keeps_what_an_unbroken_one_does(tmp_path: Path, stop: int) -> None:
    whole = run(Scripted(tmp_path, best="loss", stop=3), tmp_path / "whole")

    def interrupt(step: FakeStep) -> None:
        if step.step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    first = Scripted(tmp_path, best="loss", stop=3)
    first.hook = interrupt
    assert run(first, tmp_path / "run").interrupted == (stop < 13)  # the step with number 13 ends the run anyway
    second = Scripted(tmp_path, best="loss", stop=3)
    second.load_state_dict(load_state(tmp_path / "run").state)
    outcome = run(second, tmp_path / "run", resume=True)
    assert (outcome.done, outcome.best, outcome.stopped) == (whole.done, whole.best, True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for folder in ("", "best"):
        found, expected = (load_state(tmp_path / name / folder) for name in ("run", "whole"))
        assert found.step == expected.step and found.extra == expected.extra
        assert torch.equal(found.state["weights"]["w"], expected.state["weights"]["w"])


@pytest.mark.parametrize(
    ("score", "values", "best"),
    [
        ("loss", [3.0, 2.0, 2.0, 1.5], [True, True, False, True]),
        ("accuracy", [0.5, 0.4, 0.6, 0.6], [True, False, True, False]),
        ("pearson", [math.nan, -0.5, math.nan, -0.4], [False, True, False, True]),
        ("perplexity", [math.inf, 9.0, math.inf, 8.0], [True, True, False, True]),
    ],
)
def test_what_is_better(score: str, values: list[float], best: list[bool]) -> None:
    found = Best(score)
    assert [found.better({score: value}, number) for number, value in enumerate(values)] == best


def test_a_score_that_the_evaluation_lacks(tmp_path: Path) -> None:
    with pytest.raises(SurgError, match="SURG031.*says no accuracy"):
        run(Scripted(tmp_path, best="accuracy"), tmp_path / "run")


def test_nothing_held_out(tmp_path: Path) -> None:
    with pytest.raises(SurgError, match="SURG052.*no rows are held out"):
        train(Scripted(tmp_path, best="loss"), replace(data(), held_out=None), tmp_path / "run", progress=False)


def test_a_run_that_begins_anew_has_no_best_state_of_another(tmp_path: Path) -> None:
    run(Scripted(tmp_path, best="loss", save=4, keep=1), tmp_path / "run")
    assert (tmp_path / "run" / "best").exists() and (tmp_path / "run" / "saves").exists()
    run(Scripted(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run" / "best").exists() and not (tmp_path / "run" / "saves").exists()


def test_patience_alone_watches_the_loss() -> None:
    step = surgery.parse("step { evaluate = every(5)  stop = patience(2) }").step
    assert (step.best, step.stop) == ("loss", 2)
    step = surgery.parse("step { evaluate = every(5)  stop = patience(evaluations = 2)  best = f1 }").step
    assert (step.best, step.stop) == ("f1", 2)
