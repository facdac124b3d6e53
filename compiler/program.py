"""A checked program: what `surgery.parse` gives, and what can be built without text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.compiler import nodes
from surgery.compiler.algebra.compose import Composed
from surgery.compiler.algebra.measured import Gain
from surgery.compiler.diagnostics import Diagnostic
from surgery.compiler.plan import DataPlan, ModelPlan, StepPlan
from surgery.compiler.printer import show
from surgery.compiler.span import Source, Span


@dataclass(frozen=True)
class Rule:
    """An `adapt` rule with its method looked up and its arguments read; `arguments` are numbers, texts and booleans."""

    node: nodes.Adapt
    method: nodes.Method
    arguments: Mapping[str, int | float | str | bool]
    expect: int | None = None
    alias: str | None = None
    strategy: str = "auto"
    update: str = "auto"
    active: Mapping[str, int] | None = (
        None  # how many of its sites learn at a time (`count`), and for how long (`every`)
    )
    asks: tuple[Gain, ...] = ()  # numbers of the data; the parameters made of them are missing in `arguments`

    @property
    def methods(self) -> tuple[nodes.Method, ...]:
        """The methods that it applies: one, or those of a composition."""
        return tuple(part.method for part in self.method.parts) if isinstance(self.method, Composed) else (self.method,)

    @property
    def method_span(self) -> Span | None:
        """Where the rule says its method."""
        return next((clause.value.span for clause in self.node.clauses if isinstance(clause, nodes.With)), None)


@dataclass(frozen=True)
class TrainRule:
    """`train PATTERN { lr = ... }`."""

    node: nodes.Train
    lr: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class Moving:
    """What a `step` block says of what moves in it: `train` and `freeze`."""

    node: nodes.Step | None = None
    trained: tuple[TrainRule, ...] = ()
    frozen: tuple[nodes.Freeze, ...] = ()


@dataclass(frozen=True, init=False)
class Program:
    """A program whose names, kinds, shapes and settings are checked; it knows no model yet.

    Built from text by `surgery.parse`, or from items: `Program(surgery.adapt("**.query", surgery.method("lora")))`.
    Items may be nested in lists, given by keyword (`rules = [...]`), and be `.surg` text themselves. Printing it gives
    `.surg` text that parses to the same program. Raises `SurgError` with all that is wrong, and TypeError for anything
    that is no item.
    """

    source: Source
    tree: nodes.Tree
    folder: Path
    model: ModelPlan | None
    rules: tuple[Rule, ...]
    trained: tuple[TrainRule, ...]
    frozen: tuple[nodes.Freeze, ...]
    steps: tuple[StepPlan, ...]  # the `step` blocks, in order; one of defaults where there is none
    moving: tuple[Moving, ...]  # what each of them says of what moves
    data: DataPlan | None
    methods: Mapping[str, nodes.Method]
    warnings: tuple[Diagnostic, ...]

    def __init__(self, *items: Any, **named: Any) -> None:
        from surgery.compiler import p1_parse, p2_check  # they make programs, so they import this file

        tree = nodes.Tree(tuple(_flat((items, named.values()))))
        checked = p2_check.run(p1_parse.run(Source("<program>", show(tree))))
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, getattr(checked, name))

    @classmethod
    def of(cls, **fields: Any) -> Program:
        """A program from its checked parts; for `p2_check`."""
        program = object.__new__(cls)
        for name in cls.__dataclass_fields__:
            object.__setattr__(program, name, fields[name])
        return program

    @property
    def reads_data(self) -> bool:
        """Whether some numbers of its rules are those of the data (`rank = hidden_dimension_gain()`)."""
        return any(rule.asks for rule in self.rules)

    def __str__(self) -> str:
        return show(self.tree)

    @property
    def step(self) -> StepPlan:
        """The first `step` block, whose settings of the whole run are those of all blocks."""
        return self.steps[0]


def _flat(items: Iterable[Any]) -> Iterable[nodes.Item]:
    from surgery.compiler import p1_parse

    for item in items:
        if isinstance(item, nodes.Item):
            yield item
        elif isinstance(item, str):
            yield from p1_parse.run(Source("<text>", item)).items
        elif isinstance(item, list | tuple) or type(item) is type({}.values()):
            yield from _flat(item)
        elif item is not None:
            raise TypeError(f"{item!r} is no item of a program: use surgery.adapt, train, step, ... or .surg text")
