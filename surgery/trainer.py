"""`transformers.Trainer` over an adapted model: a callback that drives the step's clock."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from surgery.compiler.diagnostics import fail
from surgery.runtime.clock import CLOCK, Clock
from surgery.runtime.modules import is_adapted


class TrainerCallback(transformers.TrainerCallback):
    """Runs a program's events around the optimizer steps of a `transformers.Trainer`.

    `model` is what `surgery.apply` was given; default: the trainer's own. The losses are those of `surgery.compile` on
    the same batches with the same settings. Steps that a gradient scaler skips run no event and are not counted.
    Checkpoints hold the clock: a resumed training is exact. A program without events has no clock, and nothing is run.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self.clock = None if model is None else _clock(model)
        self._scale = 0.0  # of a gradient scaler, before the optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Set the clock to where the training stands; raises SURG060 for another model than the callback's."""
        if self.model is None or not any(module is self.model for module in model.modules()):
            if self.model is not None:
                help_text = "give the callback the model that the Trainer has"
                raise fail("SURG060", "the Trainer trains another model than the callback's", help=help_text)
            self.model, self.clock = model, _clock(model)
        if self.clock is not None:
            self.clock.start(state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Before the first micro-batch of an optimizer step."""
        if self.clock is not None and self.model is not None:
            self.clock.begin(self.model, _scale(optimizer))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Before the optimizer, with gradients clipped."""
        self._scale = _scale(optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """After the optimizer, if its gradients did not overflow."""
        if self.clock is not None:
            self.clock.end(optimizer, taken=_scale(optimizer) >= self._scale)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Nobody drives the clock from here on."""
        if self.clock is not None:
            self.clock.running = False


def _clock(model: nn.Module) -> Clock | None:
    """The clock of an adapted model, None for a program without events; SURG060 for a model that is not adapted."""
    clock = getattr(model, CLOCK, None)
    if clock is None and not is_adapted(model):
        raise fail("SURG060", "the model is not adapted", help="call surgery.apply(program, model) first")
    return clock if isinstance(clock, Clock) else None


def _scale(optimizer: Any) -> float:
    """The scale of the gradient scaler that accelerate has put around an optimizer: it is less after a skipped step.

    `step_was_skipped` of the same object does not say so of fused optimizers, which skip a step themselves.
    """
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
