"""One loss per task: the sum over the labels and how many there are, equal to what the transformers model returns.

The functions need `torch` alone: the emitter prints their source into step.py, so what is written here is what runs.
A sum and a count, not a mean: an optimizer step divides by the labels of all its micro-batches together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from surgery.compiler.diagnostics import did_you_mean, fail


@dataclass(frozen=True)
class Loss:
    """`total(output, labels)` is the 0-d sum in float32 or wider, `count(labels)` the 0-d int64 number of labels."""

    name: str
    total: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    count: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, output: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum and the count; their quotient is the model's own loss."""
        return self.total(output, labels), self.count(labels)

    @property
    def source(self) -> str:
        """The text of both functions, for step.py."""
        return "\n\n".join(inspect.getsource(function) for function in (self.total, self.count))


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token under the logits one place before it, summed. [rows, length, vocabulary]."""
    logits = logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def next_token_count(labels: torch.Tensor) -> torch.Tensor:
    """How many tokens are predicted: the first of a row is not, nor are those labelled -100."""
    return (labels[:, 1:] != -100).sum()


def next_token_targets(labels: torch.Tensor) -> torch.Tensor:
    """The token after each, which is what its logits are of; -100 behind the last."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def cross_entropy_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy over the last axis, summed; -100 marks what has no label."""
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")


def cross_entropy_count(labels: torch.Tensor) -> torch.Tensor:
    """How many labels there are, without those that are -100."""
    return (labels != -100).sum()


def mse_loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared differences, summed; the axis of a single output may be left out of the labels."""
    output = output.to(torch.promote_types(output.dtype, torch.float32)).reshape(labels.shape)
    return (output - labels).square().sum()


def mse_count(labels: torch.Tensor) -> torch.Tensor:
    """How many numbers are compared."""
    return torch.full((), labels.numel(), device=labels.device)


def binary_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of several labels per row, given as 0.0 and 1.0, summed."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")


def output_loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The module's own 0-d loss, a mean over its rows, times the rows."""
    return output * labels.shape[0]


def output_count(rows: torch.Tensor) -> torch.Tensor:
    """How many rows the module's own loss is a mean of; any input of the batch tells."""
    return torch.full((), rows.shape[0], device=rows.device)


NEXT_TOKEN = Loss("next_token", next_token_loss, next_token_count)
CROSS_ENTROPY = Loss("cross_entropy", cross_entropy_loss, cross_entropy_count)
MSE = Loss("mse", mse_loss, mse_count)
BINARY = Loss("binary", binary_loss, mse_count)
OUTPUT = Loss("output", output_loss, output_count)

_TASKS = {
    "causal_lm": NEXT_TOKEN,
    "masked_lm": CROSS_ENTROPY,
    "seq2seq_lm": CROSS_ENTROPY,
    "token_classification": CROSS_ENTROPY,
}
_PROBLEMS = {
    "regression": MSE,
    "single_label_classification": CROSS_ENTROPY,
    "multi_label_classification": BINARY,
}
_SPELT = {"causal_lm": NEXT_TOKEN, "cross_entropy": CROSS_ENTROPY, "mse": MSE, "output": OUTPUT}


def choose(loss: str, task: str | None, labels: int | None = None, problem_type: str | None = None) -> Loss | None:
    """The loss of a step: the one that it spells (`loss = mse`), else the task's own.

    `labels` and `problem_type` are the model's (`config.problem_type`): one label is a regression, unless it says
    otherwise. Returns None where neither says which (`auto` without a task, feature_extraction): the caller takes the
    module's 0-d output or reports the missing loss. Raises SURG004 for a loss that does not exist.
    """
    if loss != "auto":
        if loss not in _SPELT:
            raise fail("SURG004", f"there is no loss `{loss}`", help=did_you_mean(loss, ["auto", *_SPELT]))
        return _SPELT[loss]
    if task in ("sequence_classification", "image_classification"):
        return _PROBLEMS[problem_type or ("regression" if labels == 1 else "single_label_classification")]
    return _TASKS.get(task or "")


def decoder_inputs(labels: torch.Tensor, start: int, padding: int) -> torch.Tensor:
    """What a sequence-to-sequence decoder reads: the labels one place later, behind `start`; -100 becomes `padding`."""
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, padding)
