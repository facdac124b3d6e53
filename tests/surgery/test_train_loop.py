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
from surgery.compiler.plan import DataPlan, ModelPlan, Plan, StepPlan, Totals
from surgery.runtime.data import Data, Examples
from surgery.runtime.run_folder import load_state
from surgery.runtime.train import train

pytestmark = pytest.mark.usefixtures("captured_once")


class FakeStep:
    """Learns one number with dropout and momentum; every state that a real step has, in small."""

    source = "# a step\n"

    def __init__(self, folder: Path, steps: int = 7, **settings: Any) -> None:
        self.folder, self.steps, self.step = folder, steps, 0
        self.plan = Plan(
            spec="", file="demo.surg", sites=(), formulas={}, tokens=0,
            model=ModelPlan(source="hub", name="tiny", task="sequence_classification", labels=2),
            step=StepPlan(batch=3, seed=5, **settings), data=DataPlan(path="rows.jsonl"),
            totals=Totals(sites=0, trainable=0, frozen=0, model=1, share=0.0),
        )  # fmt: skip
        torch.manual_seed(self.plan.step.seed)
        self.weight = torch.zeros(2, requires_grad=True)
        self.optimizer = torch.optim.SGD([self.weight], lr=0.01, momentum=0.9)
        self.learning_rate = 0.01
        self.hook: Any = None

    def __call__(self, batch: dict[str, Tensor]) -> Any:
        if self.hook:
            self.hook(self)
        loss = self.loss(batch, torch.rand(2))
        if torch.isfinite(loss):
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.step += 1
        return SimpleNamespace(loss=loss.detach(), penalty=torch.tensor(0.0))

    def loss(self, batch: dict[str, Tensor], noise: Tensor) -> Tensor:
        x = batch["input_ids"].float().mean(1, keepdim=True) / 10
        return torch.nn.functional.cross_entropy(x * (self.weight + noise), batch["labels"])

    def evaluate(self, batch: dict[str, Tensor]) -> Any:
        count = torch.tensor(len(batch["labels"]))
        logits = batch["input_ids"].float().mean(1, keepdim=True) * self.weight.detach()
        loss = self.loss(batch, torch.zeros(2)).detach() * count
        return SimpleNamespace(loss=loss, count=count, output=logits)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": {"w": self.weight.detach()}, "optimizer": self.optimizer.state_dict(), "step": self.step,
                "random": {"cpu": torch.get_rng_state()}}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight.data.copy_(state["weights"]["w"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        torch.set_rng_state(state["random"]["cpu"])


def data(rows: int = 8) -> Data:
    tokens = tuple((number, number + 1) for number in range(rows))
    examples = Examples(tokens, tuple(number % 2 for number in range(rows)), 0)
    return Data(examples, examples, ("a", "b"))


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


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
        return SimpleNamespace(loss=later(), penalty=result.penalty)


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
