"""A tensor's start as it is written: which starts there are, what each takes, and what is wrong, located."""

from __future__ import annotations

from surgery.compiler import nodes
from surgery.compiler.algebra.build import Builder
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.formula import Start, TensorFormula
from surgery.compiler.algebra.names import STARTS
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.shapes import check_extent, spelt
from surgery.compiler.algebra.sources import SOURCES, check_start
from surgery.compiler.algebra.structures import STRUCTURES
from surgery.compiler.diagnostics import did_you_mean, fail
from surgery.compiler.printer import show

START_NUMBER = {"constant": "c", "normal": "std", "uniform": "a", "kaiming_uniform": "a", "choice": "n"}


def read_start(node: nodes.Tensor, builder: Builder) -> tuple[Start, Expression]:
    """The start of a tensor, and a placeholder of its shape; raises `SurgError` at what is wrong."""
    start = node.start
    if not isinstance(start, nodes.Subscript):
        if isinstance(start, nodes.Name) and start.name in STARTS:
            advice = f"write `{start.name}[out, in]`; one number is `{start.name}[1]`"
            raise fail("SURG004", "a start needs a shape", start.span, help=advice)
        if isinstance(start, nodes.Call) and start.function in STARTS:
            _, most = STARTS[start.function]
            sizes = ", ".join(show(argument.value) for argument in start.arguments)
            shaped = f"{show(start)}[out, in]" if most else f"{start.function}[{sizes or 'out, in'}]"
            message = "a start needs a shape, in brackets"
            raise fail("SURG004", message, start.span, help=f"write `{shaped}`")
        value = builder.expression(start)
        check_start(value)
        return Start("expression", (), value, show(start)), value
    shape = []
    for index in start.indices:
        if isinstance(index, nodes.Slice):
            raise fail("SURG004", "a shape has sizes, not a slice", index.span or start.span)
        length = builder.size(index)
        if length.whole is not None and length.whole < 1:
            raise fail("SURG004", f"a size must be at least 1, `{show(index)}` is {length}", index.span)
        shape.append(length)
    check_extent(tuple(shape), start.span)
    base = start.operand
    name = base.function if isinstance(base, nodes.Call) else base.name if isinstance(base, nodes.Name) else None
    placeholder = Expression("tensor", (), tuple(shape), name=node.name)
    if name in STARTS:
        arguments = base.arguments if isinstance(base, nodes.Call) else ()
        least, most = STARTS[name]
        if not least <= len(arguments) <= most:
            raise fail("SURG004", f"`{name}` takes {'no number' if most == 0 else 'one number'}", base.span)
        for argument in arguments:
            if argument.name not in (None, START_NUMBER.get(name)):
                known = did_you_mean(argument.name or "", [START_NUMBER[name]])
                raise fail("SURG002", f"`{name}` has no argument `{argument.name}`", argument.span, help=known)
        numbers = tuple(builder.number(argument.value) for argument in arguments)
        spread = numbers[0].constant if numbers and name != "constant" else None
        if spread is not None and spread < 0:
            raise fail("SURG004", f"`{show(base)}`: the spread must be at least 0", base.span)
        if name in ("eye", "orthogonal", "onehot_rows") and len(shape) < 2:
            raise fail("SURG005", f"`{name}` starts a matrix, not {spelt(tuple(shape))}", start.span)
        if name == "choice" and node.role != "frozen":
            message = "`choice` draws positions, which no step can change"
            raise fail("SURG004", message, node.span, help=f"write `{node.name} = frozen {show(start)}`")
        if name in ("choice", "onehot_rows"):
            wanted, limit = (_product(shape), numbers[0]) if name == "choice" else (shape[-2], shape[-1])
            _check_distinct(start, wanted, limit)
        return Start(name, numbers, None, show(base)), placeholder
    if isinstance(base, nodes.Name) and base.name not in builder.names:
        raise fail("SURG002", f"there is no start `{base.name}`", base.span, help=did_you_mean(base.name, STARTS))
    if isinstance(base, nodes.Call) and base.function not in (*STRUCTURES, *SOURCES):
        known = did_you_mean(base.function, [*STARTS, *STRUCTURES])
        raise fail("SURG002", f"there is no start `{base.function}`", base.span, help=known)
    value = builder.expression(base)
    check_start(value)
    if len(value.shape) != len(shape) or any(a.differs_from(b) for a, b in zip(value.shape, shape, strict=True)):
        raise fail("SURG005", f"`{show(base)}` is {spelt(value.shape)}, not {spelt(tuple(shape))}", start.span)
    return Start("expression", (), value, show(base)), placeholder


def _check_distinct(start: nodes.Subscript, wanted: Quantity, limit: Quantity) -> None:
    """As many distinct positions as are wanted must exist."""
    if limit.constant is not None and (limit.whole is None or limit.whole < 1):
        raise fail("SURG004", f"`{show(start.operand)}`: a whole number of at least 1 is needed", start.operand.span)
    if limit.whole is not None and wanted.whole is not None and wanted.whole > limit.whole:
        message = f"`{show(start)}` needs {wanted} distinct positions of {limit}"
        raise fail("SURG004", message, start.span, help=f"ask for at most {limit}")


def _product(shape: list[Quantity]) -> Quantity:
    """How many entries a shape has."""
    total = Quantity.of(1)
    for length in shape:
        total = total * length
    return total


def named(tensor: TensorFormula) -> Expression:
    """What the tensor's name stands for in expressions: a frozen `onehot_rows` is known to select rows."""
    value = Expression("tensor", (), tensor.shape, name=tensor.name, span=tensor.span)
    if tensor.role == "frozen" and tensor.start.name == "onehot_rows":
        return Expression("selection", (value,), tensor.shape, span=tensor.span)
    return value
