"""The step's clock in module scope: events of a program whose model somebody else trains.

The clock is a module on the model's root, so that it goes where the model goes: to a device, into a copy, into a
checkpoint. It runs the text that `step.py` has for the events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from surgery.compiler.diagnostics import fail
from surgery.compiler.emit.clock import clock_source
from surgery.compiler.event_program import GRAD, KEPT, START, EventProgram
from surgery.runtime.executed import executed

CLOCK = "surgery_clock"  # its name on the root
_WATCHED = WeakTensorKeyDictionary()  # parameters whose gradients are refused outside of a step


class Clock(nn.Module):
    """Counts a model's optimizer steps and runs the events of its program; `source` is the text that it executes.

    Whoever trains calls `start` once, and around each optimizer step `begin` and `end`. `steps_taken` is saved with
    the model; so is what events write, which are tensors of the model.
    """

    steps_taken: Tensor  # int64, 0-d: by the model, in all trainings
    began_at: Tensor  # int64, 0-d: `steps_taken` when the present training began; -1 before the first

    def __init__(self, events: Iterable[EventProgram], names: Mapping[str, str], model: nn.Module) -> None:
        super().__init__()
        events = tuple(events)
        self.source = clock_source(events)
        read = dict.fromkeys(name for event in events for site in event.sites for name in site.values())
        self._kept_names = [name for name in read if name.endswith(KEPT)]
        beside = (KEPT, START, GRAD)
        plain = dict.fromkeys(
            name for key in read for name in [key, *_behind(key, beside)] if not name.endswith(beside)
        )
        self._names = {name: names.get(name, name) for name in plain}  # as events call it: as the model does
        # Neither saved nor sent to other ranks: it is what the model was loaded with.
        self._starts = {
            name: stored(model, self._names[name.removesuffix(START)]).detach().clone()
            for name in read
            if name.endswith(START)
        }
        self._kept: dict[str, Tensor] = {}  # what is copied at a step's start
        self._weights: dict[str, Tensor] = {}  # in a step: what its events read and write
        self.step = self.steps = 0
        self.running = False  # between `begin` and `end`
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("began_at", torch.full((), -1, dtype=torch.int64, device=device))

    def start(self, taken: int, steps: int) -> None:
        """Begin a training of `steps` steps, or go on with one of which `taken` are done, skipped ones included.

        Raises SURG054 where the model's state is not that of a training so far.
        """
        self.running = False
        if taken == 0:
            self.began_at.copy_(self.steps_taken)
        began, self.step = int(self.began_at), int(self.steps_taken)
        if began < 0 or self.step - began > taken:
            known = "has no steps of it" if began < 0 else f"has taken {self.step - began}"
            message = f"training goes on after step {taken}, but the model {known}"
            raise fail("SURG054", message, help="resume from a checkpoint of the same program, with its model's state")
        self.steps = began + steps

    @torch.no_grad()
    def begin(self, model: nn.Module, scale: float = 1.0) -> None:
        """Before the first forward of an optimizer step: keep what events compare with, run those that come first.

        The gradients of what the methods add to the loss come first too, times the loss `scale` of float16 gradients:
        those of the batch are added to them before they are clipped.
        """
        weights = {key: stored(model, name) for key, name in self._names.items()} | self._starts
        for name in self._kept_names:
            if name not in self._kept:
                self._kept[name] = torch.empty_like(weights[name.removesuffix(KEPT)], requires_grad=False)
        self._weights = weights | self._kept
        functions = _functions(self.source)
        functions["begin_step"](self._weights, self.step, self.steps)
        self.running = True
        if "penalty" in functions:
            with torch.enable_grad():
                (scale * functions["penalty"](self._weights, self.step, self.steps)).backward()

    @torch.no_grad()
    def end(self, optimizer: Any = None, *, taken: bool = True) -> None:
        """After the optimizer: the events, unless the step was skipped."""
        self.running = False
        if taken:
            _functions(self.source)["end_step"](self._weights, self.step, self.steps, optimizer)
            self.step += 1
            self.steps_taken.fill_(self.step)
        self._weights = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Clock:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._starts = {name: fn(value) for name, value in self._starts.items()}
        self._kept.clear()
        return self


def stored(model: nn.Module, name: str) -> Tensor:
    """A parameter as it is stored, or a buffer: an attribute may be what is computed from it."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    found = owner._parameters.get(last)
    return owner.get_buffer(last) if found is None else found


def attach(clock: Clock | None, model: nn.Module, owners: Iterable[nn.Module]) -> None:
    """Put a clock on a model, and refuse gradients where it does not run: events forgotten would be silent.

    Without a clock all gradients are refused.
    """
    if clock is not None:
        model.add_module(CLOCK, clock)
    for module in dict.fromkeys([model, *owners]):
        module.register_forward_hook(partial(_watch, clock))


def _watch(clock: Clock | None, module: nn.Module, arguments: Any, output: Any) -> None:
    """Watch the gradients of a forward outside of a step; here, since copies and shards are other parameters."""
    if not torch.is_grad_enabled() or (clock is not None and clock.running):
        return
    for parameter in module.parameters():
        if parameter.requires_grad and parameter not in _WATCHED:
            hook = parameter.register_post_accumulate_grad_hook(partial(_refuse, clock))  # type: ignore[no-untyped-call]
            _WATCHED[parameter] = hook


def _refuse(clock: Clock | None, parameter: Tensor) -> None:
    if clock is None:
        message = "a run with events that is attached to a model is not trained there: it has no clock"
        raise fail("SURG060", message, help="continue it with `surgery train --resume`")
    if not clock.running:
        message = "the program has events, and nobody drives the step's clock"
        raise fail("SURG060", message, help="give the Trainer `callbacks=[surgery.TrainerCallback(model)]`")


def _behind(name: str, suffixes: Iterable[str]) -> list[str]:
    return [name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)]


@lru_cache
def _functions(source: str) -> dict[str, Any]:
    """The text executed, not kept in the clock: a model that is copied or pickled holds text alone."""
    return executed(source, "surgery_clock", f"<clock of {hash(source):x}>")
