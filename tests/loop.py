"""A training step in small for tests of the loop around it, and rows for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from surgery.compiler.plan import DataPlan, ModelPlan, Plan, StepPlan, Totals
from surgery.runtime.data import Data, Examples


class FakeStep:
    """Learns one number with dropout and momentum; every state that a real step has, in small."""

    source, scope = "# a step\n", "graph"

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

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.steps,)

    def __call__(self, batch: dict[str, Tensor]) -> Any:
        if self.hook:
            self.hook(self)
        loss = self.loss(batch, torch.rand(2))
        if torch.isfinite(loss):
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.step += 1
        return SimpleNamespace(loss=loss.detach(), penalty=torch.tensor(0.0), gradient_norm=None)

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
