"""What a method becomes when its parameters and a site's sizes are filled in: tensors, one equation, events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from surgery.compiler.algebra.condition import Condition
from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.span import Span

Role = Literal["train", "frozen", "state"]


@dataclass(frozen=True)
class Start:
    """How a tensor begins: a named distribution with its numbers, or an expression of W."""

    name: str
    arguments: tuple[Quantity, ...] = ()
    expression: Expression | None = None
    text: str = ""


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


@dataclass(frozen=True)
class ChangeFormula:
    """`target operator value` of an event."""

    target: str
    operator: str
    value: Expression
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class EventFormula:
    """`after step when condition { changes }`."""

    phase: str
    when: Condition
    changes: tuple[ChangeFormula, ...]
    text: str
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def moves_base(self) -> bool:
        """Whether it assigns to W."""
        return any(change.target == "W" for change in self.changes)


@dataclass(frozen=True)
class MethodFormula:
    """One method at one size: `form` is "delta" or "weight", `expression` its value `[out, in]`."""

    name: str
    tensors: tuple[TensorFormula, ...]
    form: str
    expression: Expression
    dropout: float
    requirements: tuple[tuple[Condition, Span | None], ...]
    events: tuple[EventFormula, ...]
    equation: str
    rank: int | None = None
    coordinates: frozenset[str] = frozenset()  # which of layer, slot, site, heads ... it reads
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def trained(self) -> frozenset[str]:
        """Names of the trained tensors."""
        return frozenset(tensor.name for tensor in self.tensors if tensor.role == "train")
