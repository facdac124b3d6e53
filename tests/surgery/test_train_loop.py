"""The loop: the same losses after any interruption, nothing kept of a broken step. (A fake step; real: test_cli.)"""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.compiler.diagnostics import SurgError
from surgery.runtime.run_folder import load_state
from surgery.runtime.train import train
from tests.loop import FakeStep, data, losses

pytestmark = pytest.mark.usefixtures("captured_once")


def test_a_run_writes_metrics_and_evaluations(tmp_path: Path) -> None:
    lines: list[str] = []
    outcome = train(FakeStep(tmp_path, evaluate=3, log=2), data(), tmp_path / "run", progress=False, log=lines.append)
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [2, 5, 6]
    assert {"step", "loss", "lr", "seconds"} <= set(rows[0])
    assert [entry.split()[1] for entry in lines] == ["1", "2", "3", "5", "6"]
    assert outcome.done == 7 and not outcome.interrupted and 0 <= outcome.evaluation["accuracy"] <= 1
    assert f"loss {rows[1]['loss']!r}" in lines[0]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_an_interrupted_run_continues_bitwise(tmp_path: Path, stop: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    whole = FakeStep(tmp_path)
    train(whole, data(), tmp_path / "whole", progress=False)

    def interrupt(step: FakeStep) -> None:
        if step.step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    first = FakeStep(tmp_path)
    first.hook = interrupt
    outcome = train(first, data(), tmp_path / "run", progress=False)
    assert outcome.interrupted and outcome.done == stop + 1 == load_state(tmp_path / "run").step
    assert signal.getsignal(signal.SIGINT) is before

    torch.manual_seed(99)
    second = FakeStep(tmp_path)
    second.load_state_dict(load_state(tmp_path / "run").state)
    train(second, data(), tmp_path / "run", resume=True, progress=False)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert torch.equal(second.weight, whole.weight)


def test_rows_behind_the_save_are_cut_off_on_resume(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(step: FakeStep) -> None:
        if step.step == 5:
            raise Killed

    first = FakeStep(tmp_path, save=2, keep=1)
    first.hook = kill
    with pytest.raises(Killed):
        train(first, data(), tmp_path / "run", progress=False)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # the crash came while it wrote
    state = load_state(tmp_path / "run")
    assert state.step == 4 and os.listdir(tmp_path / "run" / "saves") == ["step-000004"]
    second = FakeStep(tmp_path, save=2)
    second.load_state_dict(state.state)
    train(second, data(), tmp_path / "run", resume=True, progress=False)
    train(FakeStep(tmp_path), data(), tmp_path / "whole", progress=False)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_other_data_is_refused_on_resume(tmp_path: Path) -> None:
    train(FakeStep(tmp_path), data(), tmp_path / "run", progress=False)
    with pytest.raises(SurgError, match="begun with other rows"):
        train(FakeStep(tmp_path), data(9), tmp_path / "run", resume=True, progress=False)


def test_a_loss_that_is_not_finite_keeps_the_state_before_it(tmp_path: Path) -> None:
    def spoil(step: FakeStep) -> None:
        if step.step == 4:
            step.loss = lambda batch, noise: torch.tensor(math.nan)  # type: ignore[method-assign]

    step = FakeStep(tmp_path)
    step.hook = spoil
    with pytest.raises(SurgError, match="the loss is nan at step 4") as caught:
        train(step, data(), tmp_path / "run", progress=False)
    assert caught.value.diagnostics[0].code == "SURG053"
    state = load_state(tmp_path / "run")
    assert state.step == 4 and torch.isfinite(state.state["weights"]["w"]).all()
    assert [number for number, _ in losses(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_state_that_is_broken_already_does_not_replace_the_last_save(tmp_path: Path) -> None:
    def spoil(step: FakeStep) -> None:
        if step.step == 5:
            step.weight.data.fill_(math.inf)

    step = FakeStep(tmp_path, save=2)
    step.hook = spoil
    with pytest.raises(SurgError, match="SURG053"):
        train(step, data(), tmp_path / "run", progress=False)
    assert load_state(tmp_path / "run").step == 4


class OnGpu(FakeStep):
    """Its losses are there later: it notes when a step is taken, and when its loss is read."""

    def __init__(self, folder: Path, steps: int = 7, **settings: Any) -> None:
        super().__init__(folder, steps, **settings)
        self.events: list[str] = []

    def __call__(self, batch: dict[str, Tensor]) -> Any:
        number, result = self.step, super().__call__(batch)
        if self.step == number:  # on a GPU nobody waits for the loss inside a step: it is taken anyway
            self.step += 1
            self.weight.data.fill_(math.nan)
        self.events.append(f"take {number}")

        def read() -> float:
            self.events.append(f"read {number}")
            return float(result.loss)

        later = type("Later", (), {"is_cuda": True, "__float__": lambda _: read()})
        return SimpleNamespace(loss=later(), penalty=result.penalty, gradient_norm=None)


def test_the_loss_of_a_step_on_a_gpu_is_read_while_the_next_one_runs(tmp_path: Path) -> None:
    lines: list[list[str]] = [[], []]
    outcomes = []
    for name, kind, said in (("cpu", FakeStep, lines[0]), ("gpu", OnGpu, lines[1])):
        step = kind(tmp_path, evaluate=3, save=2, log=1)
        outcomes.append(train(step, data(), tmp_path / name, progress=False, log=said.append))
    assert losses(tmp_path / "gpu") == losses(tmp_path / "cpu") and len(lines[0]) == 7
    assert [text.rpartition("  ")[0] for text in lines[1]] == [text.rpartition("  ")[0] for text in lines[0]]
    assert (outcomes[0].loss, outcomes[0].evaluation) == (outcomes[1].loss, outcomes[1].evaluation)
    assert isinstance(step, OnGpu)
    # Saved after 2, 4 and 6, evaluated after 3, 6 and 7: only the first and the fifth loss can wait.
    assert step.events == ["take 0", "take 1", "read 0", "read 1", "take 2", "read 2", "take 3", "read 3", "take 4",
                      "take 5", "read 4", "read 5", "take 6", "read 6"]  # fmt: skip


def test_a_broken_step_on_a_gpu_is_named_and_nothing_behind_it_is_saved(tmp_path: Path) -> None:
    def spoil(step: FakeStep) -> None:
        if step.step == 4:
            step.loss = lambda batch, noise: torch.tensor(math.nan)  # type: ignore[method-assign]

    step = OnGpu(tmp_path, save=3)
    step.hook = spoil
    with pytest.raises(SurgError, match="the loss is nan at step 4"):
        train(step, data(), tmp_path / "run", progress=False)
    assert step.events[-1] == "read 4" and "take 5" in step.events
    assert load_state(tmp_path / "run").step == 3
    assert [number for number, _ in losses(tmp_path / "run")] == [0, 1, 2, 3]
