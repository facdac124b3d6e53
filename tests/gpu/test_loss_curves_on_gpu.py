"""200 steps with every kernel on a CUDA device, against plain torch in float32; run by `make gpu`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from surgery.compiler.kernels.low_rank import choice, narrow, plain
from tests.loss_curves import CASES, Shape, compiled, curve, distance, plain_curve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = Shape(hidden=256, vocabulary=8192, rows=8, length=64, device="cuda")
WAYS = [
    ("lora", ""),
    ("dora", "strategy = branch"),
    ("lors", "strategy = recompute"),
    ("lors", "strategy = fold"),
    ("circulant", "strategy = branch"),
    ("delta_lora", "update = literal"),
    ("delta_lora", "update = telescope"),
]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of the first loss: orders of sums, and activations with eight bits, over 200 steps of AdamW."""


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton wherever it takes the operands, also where they are small."""
    for chooses in ("fastest_for_outputs", "fastest_for_input_gradient"):
        monkeypatch.setattr(choice, chooses, lambda *sizes: next(iter(choice.STEP)))
    for reads in ("narrow_product", "narrow_gradients", "right_gradients"):
        monkeypatch.setattr(
            choice, reads, lambda wide, ranks: narrow if choice._reads_in_triton(wide, ranks) else plain
        )


@cache
def plain_losses(name: str, dtype: torch.dtype) -> list[float]:
    """Once for all ways of a method."""
    return plain_curve(CASES[name], SHAPE, compiled(CASES[name], SHAPE, dtype=dtype), dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("way", ["off", "on", "reduce_overhead"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("name", "rule"), WAYS)
def test_kernels_follow_the_plain_weights(name: str, rule: str, dtype: Any, way: str) -> None:
    losses = curve(compiled(CASES[name], SHAPE, rule, f"compile = {way}", dtype), SHAPE)
    assert losses[-1] < losses[0]
    assert distance(losses, plain_losses(name, dtype)) < BOUNDS[dtype]
