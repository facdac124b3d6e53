"""What a start may read beside W: another checkpoint's weight, the gradient of the loss, the site's inputs.

They are leaves of expressions: `weight_of` with the checkpoint's name, `gradient` and `activations`. Only starts may
hold them, and the decompositions, which no step should compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from surgery.compiler import nodes
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.structures.decomposition import PARTS as DECOMPOSITIONS
from surgery.compiler.diagnostics import fail
from surgery.compiler.printer import show

if TYPE_CHECKING:
    from surgery.compiler.algebra.build import Builder
    from surgery.compiler.algebra.formula import MethodFormula

SOURCES = frozenset({"weight_of", "grad", "activations"})
CALIBRATED = ("gradient", "activations")
OF_ACTIVATIONS = ("right_singular", "singular_values")  # what is known of them without keeping their rows


def source(node: nodes.Call, builder: Builder) -> Expression:
    """The leaf that `weight_of("org/model")`, `grad(W)` or `activations(x)` stands for; `SurgError` for anything else.

    Of the weight's shape; activations are `[tokens, in]`.
    """
    weight = builder.names.get("W")
    if not isinstance(weight, Expression):
        raise fail("SURG004", f"`{node.function}` is known only in the start of a tensor", node.span)
    wanted = {"weight_of": '"org/model"', "grad": "W", "activations": "x"}[node.function]
    if len(node.arguments) != 1 or node.arguments[0].name is not None:
        raise fail("SURG004", f"`{node.function}` takes one argument: `{node.function}({wanted})`", node.span)
    argument = node.arguments[0].value
    if node.function == "weight_of":
        return Expression("weight_of", (), weight.shape, name=builder.text(argument), span=node.span)
    if not isinstance(argument, nodes.Name) or argument.name != wanted:
        help_text = f"write `{node.function}({wanted})`"
        raise fail("SURG004", f"a start cannot read `{show(node)}`", node.span, help=help_text)
    if node.function == "grad":
        return Expression("gradient", (), weight.shape, name="W", span=node.span)
    return Expression("activations", (), (Quantity.symbol("tokens"), weight.shape[-1]), name="x", span=node.span)


def check_start(value: Expression) -> None:
    """Refuse activations anywhere but where they are summed up: their rows are never kept."""
    if value.operation == "activations":
        help_text = "write `right_singular(activations(x), r)` or `singular_values(activations(x), r)`"
        raise fail("SURG004", "the rows of `activations(x)` are not kept", value.span, help=help_text)
    for part in value.arguments:
        if not (value.operation in OF_ACTIVATIONS and part.operation == "activations"):
            check_start(part)


def check_not_start(value: Expression) -> None:
    """Refuse what only a start may hold, in the equation or an event of a method."""
    for part in walk(value):
        if part.operation in DECOMPOSITIONS or part.operation in ("weight_of", *CALIBRATED):
            called = {"gradient": "grad"}.get(part.operation, part.operation)
            help_text = f"bind a tensor to it: `U = frozen {called}(...)`"
            raise fail("SURG004", f"`{called}` belongs in the start of a tensor", part.span, help=help_text)


def calibrated(formula: MethodFormula) -> frozenset[str]:
    """What the starts of a method read of calibration data: "gradient", "activations", both or nothing."""
    starts = [tensor.start.expression for tensor in formula.tensors if tensor.start.expression is not None]
    return frozenset(part.operation for start in starts for part in walk(start) if part.operation in CALIBRATED)


def walk(node: Expression) -> Iterator[Expression]:
    """A node and all below it."""
    yield node
    for part in node.arguments:
        yield from walk(part)
