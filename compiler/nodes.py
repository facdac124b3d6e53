"""The tree of a `.surg` file, on one screen: what `p1_parse` gives and `printer` prints back.

Spans take no part in equality, so `parse(print(tree)) == tree`. Numbers keep their spelling. Everything that stands on
a line of its own carries `comments` (the lines above it with their `#`, "" for an empty line between them) and
`trailing` (the comment behind it on its line, for a block of several lines that of its `{`); a block carries `closing`,
the comments before its `}`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from surgery.compiler.span import Span


@dataclass(frozen=True, kw_only=True)
class Node:
    """Anything in the tree."""

    span: Span | None = field(default=None, compare=False, repr=False)


# --- expressions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Operand(Node):
    """What `+`, `-`, `*` and `@` join in Python as they do in a spec: `method("lora") + 2 * method("circulant")`."""

    def _joined(self, operator: str, other: object, *, swapped: bool = False) -> Binary:
        if isinstance(other, int | float) and not isinstance(other, bool) and other >= 0:
            other = Number(repr(other))
        if not isinstance(other, Operand | Number):
            raise TypeError(f"{other!r} cannot be joined with a method by `{operator}`")
        left, right = (other, self) if swapped else (self, other)
        return Binary(operator, left, right)  # type: ignore[arg-type]

    def __add__(self, other: object) -> Binary:
        return self._joined("+", other)

    def __sub__(self, other: object) -> Binary:
        return self._joined("-", other)

    def __mul__(self, other: object) -> Binary:
        return self._joined("*", other)

    def __rmul__(self, other: object) -> Binary:
        return self._joined("*", other, swapped=True)

    def __matmul__(self, other: object) -> Binary:
        return self._joined("@", other)


@dataclass(frozen=True)
class Number(Node):
    """`8`, `2.0`, `1e-4`: the spelling, digits only for whole numbers."""

    text: str


@dataclass(frozen=True)
class String(Node):
    """`"text"`: the value, without quotes and escapes."""

    value: str


@dataclass(frozen=True)
class Boolean(Node):
    """`true` or `false`."""

    value: bool


@dataclass(frozen=True)
class Name(Operand):
    """A name, also `in`."""

    name: str


@dataclass(frozen=True)
class Unary(Operand):
    """`-x` or `not x`; `operator` is "-" or "not"."""

    operator: str
    operand: Expr


@dataclass(frozen=True)
class Binary(Operand):
    """`a + b`: operator is one of `+ - * / // % @ ** == != <= >= < > and or`; `operator_span` is where it stands."""

    operator: str
    left: Expr
    right: Expr
    operator_span: Span | None = field(default=None, compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Transpose(Node):
    """`x.T`."""

    operand: Expr


@dataclass(frozen=True)
class Field(Node):
    """`x.name`."""

    operand: Expr
    name: str


@dataclass(frozen=True)
class Argument(Node):
    """`value` or `name = value` in a call."""

    value: Expr
    name: str | None = None


@dataclass(frozen=True)
class Call(Operand):
    """`function(arguments)`; the function is a plain name."""

    function: str
    arguments: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class Slice(Node):
    """`start:stop` in a subscript."""

    start: Expr | None = None
    stop: Expr | None = None


@dataclass(frozen=True)
class Subscript(Node):
    """`x[indices]`; a tensor's start is a `Subscript` of a name or a call."""

    operand: Expr
    indices: tuple[Expr | Slice, ...]


@dataclass(frozen=True)
class ListOf(Node):
    """`[a, b]`."""

    items: tuple[Expr, ...] = ()


@dataclass(frozen=True)
class Comprehension(Node):
    """`body for variable in first..last`, the only argument of a call."""

    body: Expr
    variable: str
    first: Expr
    last: Expr


Expr = Number | String | Boolean | Name | Unary | Binary | Transpose | Field | Call | Subscript | ListOf | Comprehension


# --- lines ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Line(Node):
    """Anything that may carry comments."""

    comments: tuple[str, ...] = ()
    trailing: str = ""


@dataclass(frozen=True)
class Setting(Line):
    """`name = value` in a block."""

    name: str
    value: Expr


Role = Literal["train", "frozen", "state"]


@dataclass(frozen=True)
class Tensor(Line):
    """`A = train kaiming_uniform[rank, in] shared by kind as NAME { lr = 1e-3 }`; role: train, frozen or state.

    The options stand on the tensor's line and carry no comments of their own.
    """

    name: str
    role: Role
    start: Expr
    shared_by: str | None = None
    shared_as: str | None = None
    options: tuple[Setting, ...] = ()


@dataclass(frozen=True)
class Bind(Line):
    """`name = value` in a method: a derived name, or one of delta, weight, output, input, penalty."""

    name: str
    value: Expr


@dataclass(frozen=True)
class Require(Line):
    """`requires condition`."""

    condition: Expr


@dataclass(frozen=True)
class Change(Line):
    """`target operator value` in an event; operator is `=`, `+=` or `*=`."""

    target: str
    operator: str
    value: Expr


@dataclass(frozen=True)
class Reset(Line):
    """`reset A, B` in an event."""

    targets: tuple[str, ...]


@dataclass(frozen=True)
class Event(Line):
    """`after step when condition { changes }`; phase: before, after, at or every; `point` is the name behind it
    ("step", "forward", "backward"; "start" for at, "steps" for every), `interval` the number behind `every`."""

    phase: str
    point: str
    interval: Expr | None
    when: Expr | None
    changes: tuple[Change | Reset, ...]
    closing: tuple[str, ...] = ()


Statement = Tensor | Bind | Require | Event


@dataclass(frozen=True)
class Parameter(Node):
    """`rank: int = 8` of a method."""

    name: str
    kind: str
    default: Expr | None = None


@dataclass(frozen=True)
class Pattern(Node):
    """A path pattern, as it was spelt but without spaces: `{q, v}` is `{q,v}`."""

    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", "".join(self.text.split()))


@dataclass(frozen=True)
class With(Line):
    """`with EXPRESSION`."""

    value: Expr


@dataclass(frozen=True)
class Expect(Line):
    """`expect 12`."""

    count: int


@dataclass(frozen=True)
class Alias(Line):
    """`tie` or `untie`."""

    word: str


# --- items ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use(Line):
    """`use "methods.surg"`."""

    path: str


@dataclass(frozen=True)
class Model(Line):
    """`model "hub/name" { ... }`; source: hub (also folders and packages), config or python."""

    source: str
    name: str
    settings: tuple[Setting, ...] = ()
    closing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapt(Line):
    """`adapt PATTERN : Class where ... except ... { with ... }`."""

    pattern: Pattern
    classes: tuple[str, ...]
    where: Expr | None
    exceptions: tuple[Pattern, ...]
    clauses: tuple[With | Expect | Alias | Setting, ...]
    closing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Train(Line):
    """`train PATTERN { lr = ... }`."""

    pattern: Pattern
    settings: tuple[Setting, ...] = ()
    closing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Freeze(Line):
    """`freeze PATTERN`."""

    pattern: Pattern


@dataclass(frozen=True)
class Step(Line):
    """`step { settings, train, freeze }`."""

    settings: tuple[Setting | Train | Freeze, ...] = ()
    closing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data(Line):
    """`data "file.jsonl" { ... }`."""

    path: str
    settings: tuple[Setting, ...] = ()
    closing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method(Line):
    """`method name(parameters) { statements }`."""

    name: str
    parameters: tuple[Parameter, ...]
    statements: tuple[Statement, ...]
    closing: tuple[str, ...] = ()


Item = Use | Model | Adapt | Train | Freeze | Step | Data | Method


@dataclass(frozen=True)
class Tree(Node):
    """A whole file."""

    items: tuple[Item, ...] = ()
    closing: tuple[str, ...] = ()
