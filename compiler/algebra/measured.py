"""Numbers that the data tell before the plan, one for each block of the model: `rank = hidden_dimension_gain()`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from surgery.compiler import nodes
from surgery.compiler.diagnostics import did_you_mean, fail
from surgery.compiler.printer import show
from surgery.compiler.span import Span

Pooling = Literal["mean", "last"]  # how one point is made of a row's hidden states
Estimator = Literal["regression", "likelihood"]  # how the dimension of these points is estimated
OPTIONS = {"pooling": get_args(Pooling), "estimator": get_args(Estimator)}  # the defaults first


@dataclass(frozen=True)
class Gain:
    """A call of `hidden_dimension_gain` with its options; as a text it is how the plan calls it."""

    pooling: Pooling = "mean"
    estimator: Estimator = "regression"
    span: Span | None = field(default=None, compare=False)

    def __str__(self) -> str:
        values = {name: getattr(self, name) for name in OPTIONS}
        said = [f'{name} = "{value}"' for name, value in values.items() if value != OPTIONS[name][0]]
        return f"hidden_dimension_gain({', '.join(said)})"


def gain(before: float, after: float) -> int:
    """`max(round(after - before), 0) + 1`: the rank of a block whose input and output have these dimensions.

    Mapping states of dimension `before` to states of dimension `after` takes a rank of at least their difference, and
    one more lets a block learn whose states do not spread: Ed-dib et al. 2024 (GeLoRA), arXiv:2412.09250, theorem 3.2.
    """
    return max(round(after - before), 0) + 1


def read_gain(node: nodes.Call) -> Gain:
    """The options of a call; raises SURG002 for a name and SURG004 for a value that is none of them."""
    values: dict[str, Any] = {}
    for argument in node.arguments:
        name, span = argument.name or "", argument.span or node.span
        if name not in OPTIONS or name in values:
            known = did_you_mean(name, OPTIONS) or 'it takes `pooling = "mean"` and `estimator = "regression"`'
            raise fail("SURG002", f"`{node.function}` has no such option: `{show(argument)}`", span, help=known)
        value = argument.value.value if isinstance(argument.value, nodes.String) else None
        if value not in OPTIONS[name]:
            words = " or ".join(f'"{word}"' for word in OPTIONS[name])
            raise fail("SURG004", f"`{name}` is {words}, not `{show(argument.value)}`", argument.value.span)
        values[name] = value
    return Gain(**values, span=node.span)
