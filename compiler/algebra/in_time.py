"""Functions of an event that remember, or that look at all sites of a rule: ema, sensitivity, grad, keep_top, quantile.

What they remember is state of the site that no statement names. An expression with such a call becomes changes of that
state, which come before the statement, and reads of it:

    s = ema(e, b)          ema = b * ema + (1 - b) * e;  s = ema
    E = E * keep_top(s, n)     kept = ones at the n * sites largest entries of s over all sites;  E = E * kept
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery.compiler import nodes
from surgery.compiler.algebra.expression import GRADIENT, Expression, rewriting
from surgery.compiler.algebra.formula import ChangeFormula, Start, TensorFormula
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.schedule import reads_clock
from surgery.compiler.diagnostics import fail
from surgery.compiler.printer import show

if TYPE_CHECKING:
    from surgery.compiler.algebra.build import Builder

AFTER_THE_BACKWARD = ("after backward", "after step")


@dataclass
class Occasion:
    """One statement of an event while it is read: its phase, the method's tensors, and what has to come before it."""

    phase: str
    tensors: dict[str, TensorFormula]
    changes: list[ChangeFormula] = field(default_factory=list)

    def state(self, wanted: str, like: Expression, start: str = "zeros", *, shared: bool = False) -> Expression:
        """A state of the site that no statement names, or one of the whole rule."""
        name = next_name(wanted, self.tensors)
        by = "model" if shared else None
        self.tensors[name] = TensorFormula(name, "state", like.shape, Start(start, text=start), by, span=like.span)
        return Expression("tensor", (), like.shape, name=name, span=like.span)

    def change(self, target: Expression, operator: str, value: Expression, number: Quantity | None = None) -> None:
        """Change a state before the statement."""
        self.changes.append(ChangeFormula(target.name, operator, value, value.span, number))


def next_name(wanted: str, taken: Container[str]) -> str:
    """`wanted`, or `wanted_2`, `wanted_3` ... if it is taken."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def ema(builder: Builder, node: nodes.Call) -> Expression:
    """`ema(e, b)`: the exponential mean of e over the times that the statement ran, from 0."""
    value, keep = builder.expression(node.arguments[0].value), _share(builder, node, 1)
    return _averaged(builder, builder.occasion.state("ema", value), value, keep)  # type: ignore[union-attr]


def sensitivity(builder: Builder, node: nodes.Call) -> Expression:
    """`sensitivity(E, b1, b2)`: the mean of |E * grad(E)| times the mean of how far that is from its own mean.

    AdaLoRA, arXiv:2303.10512; the second mean takes the first one as it is after this step.
    """
    occasion = builder.occasion
    assert occasion is not None
    tensor, gradient = builder.expression(node.arguments[0].value), grad(builder, node)
    first, second = _share(builder, node, 1), _share(builder, node, 2)

    def absolute(value: Expression) -> Expression:
        return Expression("abs", (value,), value.shape, span=node.span)

    product = absolute(Expression("multiply", (tensor, gradient), tensor.shape))
    mean = _averaged(builder, occasion.state(f"{tensor.name}_sensitivity", tensor), product, first)
    apart = absolute(Expression("subtract", (product, mean), mean.shape))
    spread = _averaged(builder, occasion.state(f"{tensor.name}_uncertainty", tensor), apart, second)
    return Expression("multiply", (mean, spread), mean.shape)


def grad(builder: Builder, node: nodes.Call) -> Expression:
    """`grad(A)` of a trained tensor; the first argument of a call."""
    assert builder.occasion is not None
    argument = node.arguments[0].value
    name = argument.name if isinstance(argument, nodes.Name) else ""
    tensor = builder.occasion.tensors.get(name)
    if tensor is None or tensor.role != "train":
        help = "name a trained tensor of the method"
        raise fail("SURG004", f"`{show(argument)}` is not trained, so it has no gradient", argument.span, help=help)
    if builder.occasion.phase not in AFTER_THE_BACKWARD:
        help = "write `after backward { ... }`, or `after step { ... }`"
        raise fail("SURG004", f"there is no gradient {builder.occasion.phase}", node.span, help=help)
    return Expression("tensor", (), tensor.shape, name=f"{name}{GRADIENT}", span=node.span)


def keep_top(builder: Builder, node: nodes.Call) -> Expression:
    """`keep_top(score, budget)`: ones at the largest scores of all sites together, zeros elsewhere."""
    return _across(builder, node, "kept", "ones", shared=False)


def quantile(builder: Builder, node: nodes.Call) -> Expression:
    """`quantile(score, q)`: the number that a share q of the scores of all sites lies below."""
    return _across(builder, node, "quantile", "zeros", shared=True)


def _across(builder: Builder, node: nodes.Call, name: str, start: str, *, shared: bool) -> Expression:
    assert builder.occasion is not None
    score, number = builder.expression(node.arguments[0].value), builder.number(node.arguments[1].value)
    if not score.shape:
        raise fail("SURG005", f"`{node.function}` compares entries, and this is a number", node.arguments[0].value.span)
    outside = number.constant is not None and not 0 <= number.constant <= (1 if shared else float("inf"))
    if outside:
        allowed = "between 0 and 1" if shared else "at least 0"
        message = f"the second argument of `{node.function}` is {allowed}, not {number}"
        raise fail("SURG004", message, node.arguments[1].value.span)
    like = Expression("number", value=Quantity.of(0), span=node.span) if shared else score
    target = builder.occasion.state(name, like, start, shared=shared)
    builder.occasion.change(target, node.function, score, number)
    return target


def _share(builder: Builder, node: nodes.Call, place: int) -> Quantity:
    """How much of a mean stays: at least 0, below 1."""
    argument = node.arguments[place].value
    number = builder.number(argument)
    if number.constant is not None and not 0 <= number.constant < 1:
        raise fail("SURG004", f"a mean keeps a share of at least 0 and below 1, not {number}", argument.span)
    return number


def _averaged(builder: Builder, state: Expression, value: Expression, keep: Quantity) -> Expression:
    """`state = keep * state + (1 - keep) * value`; gives the state."""
    assert builder.occasion is not None

    def scaled(by: Quantity, part: Expression) -> Expression:
        return Expression("multiply", (Expression("number", value=by), part), part.shape)

    total = Expression("add", (scaled(keep, state), scaled(Quantity.of(1) - keep, value)), state.shape, span=value.span)
    builder.occasion.change(state, "=", total)
    return state


# by name: what reads a call, and how many arguments it takes
IN_TIME: dict[str, tuple[Callable[[Builder, nodes.Call], Expression], int]] = {
    "ema": (ema, 2),
    "sensitivity": (sensitivity, 3),
    "grad": (grad, 1),
    "keep_top": (keep_top, 2),
    "quantile": (quantile, 2),
}


# --- numbers of the step in a forward, and noise ----------------------------------------------------------------------

NOISE = {"gaussian": 1, "bernoulli": 2}  # how many arguments


def noise(builder: Builder, call: nodes.Call, node: nodes.Subscript) -> Expression:
    """`gaussian(step)[out, in]`: numbers drawn from the seed, the site's path and the step."""
    if builder.tensors is None:
        message = f"`{call.function}` is known in the equation of a method and in its events"
        raise fail("SURG004", message, call.span, help="a start draws by `normal(std)` and the like")
    if len(call.arguments) != NOISE[call.function]:
        raise fail(
            "SURG004", f"`{call.function}` takes {NOISE[call.function]} arguments: the step comes first", call.span
        )
    if any(isinstance(index, nodes.Slice) for index in node.indices):
        raise fail("SURG005", f"`{call.function}(...)[out, in]` takes sizes, not a range", node.span)
    step, *share = (builder.number(argument.value) for argument in call.arguments)
    shape = tuple(builder.size(index) for index in node.indices if not isinstance(index, nodes.Slice))
    if share and share[0].constant is not None and not 0 <= share[0].constant <= 1:
        raise fail("SURG004", f"a probability is between 0 and 1, not {share[0]}", call.arguments[1].value.span)
    key = f"{call.function}_key"
    name = next_name(key, builder.tensors)
    builder.tensors[name] = TensorFormula(name, "frozen", (), Start("key", text="a key of the seed and the path"))
    numbers = (Expression("number", value=value, span=call.span) for value in (step, *share))
    return Expression(call.function, (Expression("tensor", name=name), *numbers), shape, span=node.span)


def with_clock(value: Expression, tensors: dict[str, TensorFormula]) -> Expression:
    """An equation whose numbers of the step are states, written before each forward: inputs of it, not constants."""

    def stored(node: Expression) -> Expression:
        if node.operation != "number" or node.value is None or not reads_clock(node.value):
            return node
        (monomial, factor), *more = node.value.terms
        number = node.value if more else Quantity(((monomial, 1),))
        name = "_".join([*re.findall(r"\w+", str(number)), "now"])
        start = Start("clock", text=f"{number}, of each step", clock=number)
        tensors.setdefault(name, TensorFormula(name, "state", (), start, "model", "clock", span=node.span))
        leaf = Expression("tensor", name=name, span=node.span)
        if more or factor == 1:
            return leaf
        return Expression("multiply", (Expression("number", value=Quantity.of(factor)), leaf), span=node.span)

    return rewriting(stored)(value)
