"""Evaluation of a training step on held-out rows: the loss, and the scores that the task has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from surgery.compiler.plan import Plan
from surgery.runtime import distributed
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
    regression. Nothing is read from the device before the last batch is on its way. Several processes share the
    batches, and all get the result.
    """
    losses, counts, predicted, labels = [], [], [], []
    classes = 0
    for batch, counted in _shared(examples, step.plan.step.micro_batch or step.plan.step.batch):
        found = step.evaluate(batch)
        if not counted:
            continue
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
    mine = (_sum(losses), _sum(counts), _joined(predicted), _joined(labels), classes)
    totals, numbers, guesses, truths, widths = zip(*distributed.gathered(mine), strict=True)
    result = {"loss": float(sum(totals) / max(sum(numbers), 1)), "rows": float(len(examples))}
    if examples.labels is None:
        result["perplexity"] = math.exp(result["loss"]) if result["loss"] < 700 else math.inf
    elif any(found is not None for found in guesses):
        guess, truth = (torch.cat([part for part in found if part is not None]) for found in (guesses, truths))
        result |= of_classes(guess, truth, max(widths)) if max(widths) else of_numbers(guess, truth)
    return result


def _shared(examples: Examples, size: int) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """This process's batches, and whether they count: all processes take as many, since a model may be spread."""
    batches = examples.batches(size)
    for group in iter(lambda: list(islice(batches, distributed.processes())), []):
        own = distributed.number()
        yield (group[own], True) if own < len(group) else (group[0], False)


def _sum(values: list[Tensor]) -> float:
    return float(torch.stack(values).cpu().double().sum()) if values else 0.0


def _joined(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts).cpu() if parts else None
