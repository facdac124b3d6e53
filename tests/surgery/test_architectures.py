"""Every architecture of the matrix, through every pass: it starts as the base model, and learns at any size."""

from __future__ import annotations

from typing import Any

import torch

import surgery


def test_it_starts_as_the_base_model_and_learns(architecture: Any) -> None:
    model = architecture.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = surgery.compile(surgery.parse(architecture.spec()), model=model)
    for rows, length in ((2, 7), (1, 15)):
        inputs = architecture.inputs(rows, length)
        expected = model(**inputs).logits
        torch.testing.assert_close(step.forward(**inputs).logits, expected, rtol=1e-5, atol=1e-5)

    batch = {**architecture.inputs(), "labels": architecture.labels()}
    expected = model(**batch).loss
    losses = [step(batch).loss.detach() for _ in range(8)]
    torch.testing.assert_close(losses[0], expected, rtol=1e-5, atol=1e-5)
    assert losses[-1] < losses[0]
    for rows, length in ((2, 7), (5, 12)):
        inputs = architecture.inputs(rows, length)
        assert step({**inputs, "labels": architecture.labels(rows, length)}).loss.isfinite()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
