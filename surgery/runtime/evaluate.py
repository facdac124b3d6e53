"""Evaluation of a training step on held-out rows: the loss, and the scores that the task has."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from surgery.compiler.plan import Plan
from surgery.runtime.data import Examples
from surgery.runtime.scores import of_classes, of_numbers


class Evaluable(Protocol):
    """What evaluation needs of a training step."""

    @property
    def plan(self) -> Plan: ...  # noqa: D102

    def evaluate(self, batch: dict[str, Tensor]) -> Any: ...  # noqa: D102


def evaluate(step: Evaluable, examples: Examples) -> dict[str, float]:
    """`loss`, the mean over all label tokens, `rows`, and the task's scores, in one pass over the rows.

    `perplexity` for causal models; `accuracy`, `f1` and `matthews` for classes; `pearson` and `spearman` for a
    regression. Nothing is read from the device before the last batch is on its way.
    """
    losses, counts, predicted, labels = [], [], [], []
    classes = 0
    for batch in examples.batches(step.plan.step.micro_batch or step.plan.step.batch):
        found = step.evaluate(batch)
        losses.append(found.loss)
        counts.append(found.count)
        if examples.labels is None or found.output is None:
            continue
        labels.append(batch["labels"])
        if batch["labels"].is_floating_point():
            predicted.append(found.output.reshape(batch["labels"].shape))
        else:
            classes = found.output.shape[-1]
            predicted.append(found.output.argmax(-1))
    total, count = torch.stack(losses).cpu().double().sum(), torch.stack(counts).cpu().sum()
    result = {"loss": float(total / count.clamp(min=1)), "rows": float(len(examples))}
    if examples.labels is None:
        result["perplexity"] = math.exp(result["loss"]) if result["loss"] < 700 else math.inf
    elif predicted:
        guesses, truths = torch.cat(predicted).cpu(), torch.cat(labels)
        result |= of_classes(guesses, truths, classes) if classes else of_numbers(guesses, truths)
    return result
