"""Recompute on a CUDA device: the numbers of fold, less memory kept; run by `make gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH, LAYERS, ROWS = 1024, 4, 512
METHODS = """
method released(rank: int = 16) {
    A = train normal(0.01)[out, rank];  B = train orthogonal[rank, in]
    delta = surrogate(mask(W) * (4.0 * A @ B), A @ B)
}
"""


class Stack(nn.Module):
    """Linear layers with half of their weights zero."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(torch.rand_like(parameter) > 0.5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, WIDTH]` to the same."""
        for layer in self.layer:
            x = torch.tanh(layer(x))
        return x


def step_of(method: str, strategy: str, dtype: torch.dtype, compiled: str = "off") -> Any:
    """A step on the device."""
    program = surgery.parse(f"""{METHODS}
        adapt layer.* {{ with {method}  strategy = {strategy} }}
        step {{ optimizer = adamw(lr = 1e-3)  batch = {ROWS}  steps = 8  loss = mse  compile = {compiled} }}
    """)
    model = Stack(dtype).cuda()
    return surgery.compile(program, model=model, example_inputs={"x": batch(dtype)["x"]}, device="cuda")


def batch(dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows and what to predict."""
    generator = torch.Generator().manual_seed(1)
    x, labels = (torch.randn(ROWS, WIDTH, generator=generator).to("cuda", dtype) for _ in range(2))
    return {"x": x, "labels": labels}


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("method", ["released()", "sqft(rank = 16)"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_recompute_trains_as_fold_does(method: str, dtype: torch.dtype, tolerance: float, compiled: str) -> None:
    losses = []
    for strategy, mode in (("fold", "off"), ("recompute", compiled)):
        step = step_of(method, strategy, dtype, mode)
        losses.append([float(step(batch(dtype)).loss) for _ in range(8)])
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


@pytest.mark.parametrize("method", ["released()", "sqft(rank = 16)"])
def test_recompute_keeps_less_than_fold(method: str) -> None:
    """Between forward and backward fold holds one more weight per layer; recompute its two factors in bfloat16."""
    dtype, kept = torch.bfloat16, {}
    for strategy in ("fold", "recompute"):
        step = step_of(method, strategy, dtype)
        data = batch(dtype)
        step(data)  # the optimizer's own memory is there from now on
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        (y,) = step.module(data["x"].requires_grad_(), True)  # so that the first layer keeps its weight too
        torch.cuda.synchronize()
        kept[strategy] = torch.cuda.memory_allocated() - before
        assert y.requires_grad
        del y
    factors = LAYERS * 2 * 16 * WIDTH * 2
    assert kept["fold"] - kept["recompute"] >= LAYERS * WIDTH * WIDTH * 2 - factors
