"""What a method becomes when its parameters and a site's sizes are filled in: tensors, one equation, events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from surgery.compiler.algebra.condition import Condition
from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.span import Span

Role = Literal["train", "frozen", "state"]
AT_START = "at start"  # the phase of an event that runs once, when the step is made
TOKENS = Quantity.symbol("tokens")  # rows of an activation: known only in the run


def rows(name: str, size: Quantity) -> Expression:
    """The rows `x` or `y` of a site as a leaf, `[tokens, size]`."""
    return Expression(name, shape=(TOKENS, size), name=name)


def reads_rows(node: Expression, *names: str) -> bool:
    """Whether an activation occurs in an expression: any, or one of those named."""
    if node.operation in ("x", "y") and (not names or node.name in names):
        return True
    return any(reads_rows(part, *names) for part in node.arguments)


def largest_dropout(node: Expression) -> float:
    """The largest share that an expression of activations drops; 0 for none, and for one not known yet."""
    own = node.arguments[1].value if node.operation == "dropout" else None
    share = 0.0 if own is None or own.constant is None else float(own.constant)
    return max([share, *(largest_dropout(part) for part in node.arguments)])


@dataclass(frozen=True)
class Start:
    """How a tensor begins: a named distribution with its numbers, or an expression of W."""

    name: str
    arguments: tuple[Quantity, ...] = ()
    expression: Expression | None = None
    text: str = ""
    clock: Quantity | None = None  # of a state that holds a number of the step


@dataclass(frozen=True)
class TensorFormula:
    """A tensor of a method."""

    name: str
    role: Role
    shape: Shape
    start: Start
    shared_by: str | None = None
    shared_as: str | None = None
    lr: float | None = None
    weight_decay: float | None = None
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def dtype(self) -> str | None:
        """The dtype that it has whatever the other tensors are: positions and keys are int64, the clock float64."""
        return {"choice": "int64", "key": "int64", "clock": "float64"}.get(self.start.name)


@dataclass(frozen=True)
class ChangeFormula:
    """`target operator value` of an event.

    Of the operators that no text has, `reset` starts the target anew (which is its value too), and `keep_top` and
    `quantile` make it of the values at all sites and of `number`.
    """

    target: str
    operator: str
    value: Expression
    span: Span | None = field(default=None, compare=False, repr=False)
    number: Quantity | None = None

    @property
    def result(self) -> Expression:
        """What W is after a change of it at the start: the value, or its sum or difference with W."""
        if self.operator == "=":
            return self.value
        weight = Expression("weight", (), self.value.shape, name="W")
        return Expression({"+=": "add", "-=": "subtract"}[self.operator], (weight, self.value), self.value.shape)


@dataclass(frozen=True)
class EventFormula:
    """`after step when condition { changes }`, or at another point of the clock, its phase."""

    phase: str
    when: Condition
    changes: tuple[ChangeFormula, ...]
    text: str
    span: Span | None = field(default=None, compare=False, repr=False)
    from_start: bool = False  # W is what it was at the start of the run, and the change of its `+=`

    @property
    def moves_base(self) -> bool:
        """Whether it assigns to W in the steps."""
        return self.phase != AT_START and any(change.target == "W" for change in self.changes)


@dataclass(frozen=True)
class Term:
    """`input @ matrix.T`, one summand of what a site computes: `input` are rows `[tokens, in]` of x."""

    matrix: Expression
    input: Expression

    @property
    def dropout(self) -> float:
        """The largest share that the input drops."""
        return largest_dropout(self.input)

    @property
    def reads_plain_x(self) -> bool:
        """Whether the input is x itself."""
        return self.input.operation == "x" and self.input.name == "x"


@dataclass(frozen=True)
class MethodFormula:
    """One method at one size.

    form      expression                             terms
    delta     the change of W, `[out, in]`           its summands, each with its own input (one unless composed)
    weight    the weight, `[out, in]`                one
    output    rows `[tokens, out]` of x and y        none
    """

    name: str
    tensors: tuple[TensorFormula, ...]
    form: str
    expression: Expression
    terms: tuple[Term, ...]
    events: tuple[EventFormula, ...]
    equation: str
    rank: int | None = None
    coordinates: frozenset[str] = frozenset()  # which of layer, slot, site, heads ... it reads
    span: Span | None = field(default=None, compare=False, repr=False)
    sides: Shape | None = None  # [out, in], where the expression is not of that shape
    penalty: Expression | None = None  # what a site adds to the loss of a step, a number

    @property
    def moves_base(self) -> bool:
        """Whether its steps move W."""
        return any(event.moves_base for event in self.events)

    @property
    def corrections(self) -> tuple[ChangeFormula, ...]:
        """What happens to W when the step is made, in order."""
        return tuple(change for event in self.events if event.phase == AT_START for change in event.changes)

    @property
    def trained(self) -> frozenset[str]:
        """Names of the trained tensors."""
        return frozenset(tensor.name for tensor in self.tensors if tensor.role == "train")

    @property
    def shape(self) -> Shape:
        """`[out, in]`."""
        return self.sides or self.expression.shape

    @property
    def dropout(self) -> float:
        """The largest share that it drops anywhere."""
        if self.form == "output":
            return largest_dropout(self.expression)
        return max(term.dropout for term in self.terms)

    def change(self, matrix: Expression) -> Expression:
        """What the matrix of a term adds to W: a `delta` itself, of a `weight` the difference."""
        if self.form == "delta":
            return matrix
        return Expression("subtract", (matrix, Expression("weight", (), matrix.shape, name="W")), matrix.shape)

    @property
    def reads_plain_x(self) -> bool:
        """Whether every matrix meets x itself, so that the site is one product with one weight."""
        return self.form != "output" and all(term.reads_plain_x for term in self.terms)

    @property
    def reads_only_y(self) -> bool:
        """Whether it needs neither W nor x, so that it may sit on a module without a weight."""
        return self.form == "output" and not reads_rows(self.expression, "x") and not _reads_weight(self.expression)


def _reads_weight(node: Expression) -> bool:
    return node.operation == "weight" or any(_reads_weight(part) for part in node.arguments)
