"""Functions of step.py and of the model's blocks, which are called after their classes, have names of their own."""

from __future__ import annotations

import ast

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.compiler.emit.naming import OF_A_STEP

CLASSES = ("Learn", "Schedule", "Penalty", "Compiled", "Gradient", "Rest", "WithoutPadding", "PutBack")
SPEC = """
method mine(rank: int = 2) {
    A = train ones[rank, in];  B = train zeros[out, rank];  seen = state zeros[rank]
    delta = B @ A
    penalty = 1e-3 * sum(A ** 2)
    after step { seen = keep_top(seen, 2);  A *= 1 - 0.1 * cosine_up(step, steps) }
    every 2 steps { reset A }
}
adapt **.a { with mine()  active = random(3, every = 2) }
step { loss = cross_entropy  steps = 1 }
step { freeze **.B  micro_batch = 2  steps = 1 }
"""


class Mixing(nn.Module):
    """A block of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, 6]` to the same."""
        found: Tensor = self.b(torch.tanh(self.a(x)))
        return found


class Stacks(nn.Module):
    """Two blocks of each of the classes, one after the other, and statistics of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks = nn.ModuleDict(
            {f"of_{name}": nn.ModuleList([type(name, (Mixing,), {})() for _ in range(2)]) for name in CLASSES}
        )
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, 6]` to the same."""
        for stack in self.stacks.values():
            for block in stack:  # type: ignore[attr-defined]
                x = block(x)
        found: Tensor = self.norm(x)
        return found


def test_blocks_are_not_called_as_functions_of_the_step() -> None:
    torch.manual_seed(0)
    model = Stacks()
    batch = {"x": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 3])}
    expected = nn.functional.cross_entropy(model.train()(batch["x"]), batch["labels"])
    step = surgery.compile(surgery.parse(SPEC), model=model, example_inputs={"x": batch["x"]}, device="cpu")
    assert float(step(batch).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    step(batch)

    defined, blocks = set[str](), set[str]()
    for node in ast.parse(step.source).body:
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
            blocks |= {node.name} if (ast.get_docstring(node) or "").startswith("One block") else set()
        elif isinstance(node, ast.ImportFrom):
            defined |= {alias.name for alias in node.names if alias.name.islower()}
    assert len(blocks) == len(CLASSES) and not blocks & OF_A_STEP
    assert {"learn", "schedule", "penalty", "rest", "put_back", "keep_top", "redraw"} <= defined
    others = {name for name in defined - blocks if not name.startswith("mine_") and "_in_block_" not in name}
    assert others - OF_A_STEP - {"annotations"} == set()
