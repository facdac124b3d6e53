"""Numbers that depend on the step, `0.5 * step` or `cosine_up(step, steps)`: Python over whole numbers, on the host."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from typing import Any

from surgery.compiler.algebra.quantity import CLOCK, Quantity
from surgery.compiler.algebra.recorder import called
from surgery.compiler.kernels import schedules

# by name: the function, and how many arguments it takes; those of SCHEDULES read the clock whatever these are
PLAIN: dict[str, Callable[..., Any]] = {name: getattr(builtins, name) for name in ("abs", "min", "max", "round")}
SCHEDULES: dict[str, tuple[Callable[..., Any], int]] = {
    "cosine_up": (schedules.cosine_up, 2),
    "cubic_budget": (schedules.cubic_budget, 4),
    "late_budget": (schedules.late_budget, 4),
}


def reads_clock(quantity: Quantity) -> bool:
    """Whether a number is known only in a step."""
    return bool(quantity.symbols & CLOCK)


def scheduled(name: str, *arguments: Quantity) -> Quantity:
    """A call of a schedule as a number; `cubic_budget` reads the clock by itself."""
    clock = () if name == "cosine_up" else tuple(map(Quantity.symbol, ("step", "steps")))
    parts = (*clock, *arguments)
    return Quantity.unknown(f"{name}({', '.join(map(str, parts))})", *parts)


def at_step(quantity: Quantity, clock: Mapping[str, Any]) -> Any:
    """The number at a step: `clock` gives `step` and `steps`, whole numbers, or nodes of a graph that take them.

    The text is the quantity's own, which arithmetic alone has written.
    """
    functions = PLAIN | {name: function for name, (function, _) in SCHEDULES.items()}
    known: dict[str, Any] = {name: _recording(function) for name, function in functions.items()}
    known |= {name: clock[name] for name in sorted(quantity.symbols & CLOCK)}
    return eval(str(quantity), {"__builtins__": {}}, known)


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: called(function, *arguments)
