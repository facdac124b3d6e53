"""Evaluation of a training step on held-out rows: loss, and accuracy or perplexity where the task has one."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor

from surgery.compiler.plan import Plan
from surgery.runtime.data import Examples
from surgery.runtime.losses import CROSS_ENTROPY


class Evaluable(Protocol):
    """What evaluation needs of a training step."""

    @property
    def plan(self) -> Plan: ...  # noqa: D102

    def forward(self, **inputs: Tensor) -> Any: ...  # noqa: D102

    def evaluate_loss(self, batch: dict[str, Tensor]) -> tuple[Any, Any]: ...  # noqa: D102


def evaluate(step: Evaluable, examples: Examples) -> dict[str, float]:
    """`loss` (mean over all label tokens), `rows`, and `accuracy` (classes) or `perplexity` (causal models)."""
    size = step.plan.step.micro_batch or step.plan.step.batch
    total, count, right = 0.0, 0, 0
    classes = examples.labels is not None and (step.plan.model.labels or 0) > 1
    classes = classes and step.plan.step.loss in ("auto", "cross_entropy")
    for batch in examples.batches(size):
        if classes:  # one forward gives both
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = step.forward(**inputs).logits.cpu()
            loss, tokens = CROSS_ENTROPY(logits, batch["labels"])
            right += int((logits.argmax(-1) == batch["labels"]).sum())
        else:
            loss, tokens = step.evaluate_loss(batch)
        total, count = total + float(loss), count + int(tokens)
    result = {"loss": total / max(count, 1), "rows": float(len(examples))}
    if classes:
        result["accuracy"] = right / len(examples)
    elif examples.labels is None:
        result["perplexity"] = math.exp(result["loss"]) if result["loss"] < 700 else math.inf
    return result
