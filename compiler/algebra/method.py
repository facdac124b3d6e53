"""A method's body to its formula, at symbolic sizes or at a site's; everything wrong is collected and located."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from surgery.compiler import nodes
from surgery.compiler.algebra.at_rest import TRAINING
from surgery.compiler.algebra.build import Builder, Value
from surgery.compiler.algebra.event import CLOCK, KEPT, read_event
from surgery.compiler.algebra.expression import GRADIENT, MARK, Expression, number
from surgery.compiler.algebra.facts import gradients_reach
from surgery.compiler.algebra.formula import (
    TOKENS,
    EventFormula,
    MethodFormula,
    TensorFormula,
    Term,
    reads_rows,
    rows,
)  # fmt: skip
from surgery.compiler.algebra.in_time import Occasion, with_clock
from surgery.compiler.algebra.indices import check_indices
from surgery.compiler.algebra.names import (
    COORDINATES,
    FORMS,
    FUNCTIONS_IN_TIME,
    MEASURED,
    RESERVED,
    SPECIAL,
    STARTS,
    names_in,
    taken,
)
from surgery.compiler.algebra.previous import coordinate, without_zeros
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.rows import misplaced
from surgery.compiler.algebra.shapes import spelt
from surgery.compiler.algebra.sources import SOURCES, check_not_start
from surgery.compiler.algebra.starts import named, read_start
from surgery.compiler.algebra.structures import STRUCTURES
from surgery.compiler.diagnostics import Diagnostics, Note, SurgError, did_you_mean, fail
from surgery.compiler.printer import show
from surgery.compiler.span import Span


@dataclass
class _Reader:
    """Reads the statements of one method in order."""

    method: nodes.Method
    names: dict[str, Value]
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    tensors: dict[str, TensorFormula] = field(default_factory=dict)
    derived: dict[str, Span | None] = field(default_factory=dict)
    result: tuple[str, Expression] | None = None
    result_span: Span | None = None
    steps: list[str] = field(default_factory=list)  # names that are no tensors, as they are written
    equation: str = ""
    rows: Expression | None = None
    input_equation: str = ""
    events: list[EventFormula] = field(default_factory=list)
    penalty: Expression | None = None
    penalty_equation: str = ""
    used: set[str] = field(default_factory=set)
    poisoned: set[str] = field(default_factory=set)
    earlier: Callable[[Quantity], bool] = lambda back: True  # whether there is a site so many blocks earlier

    def check_indices(self) -> None:
        """Index tensors stand where they belong in the equation, the starts and the events."""
        starts = [tensor.start.expression for tensor in self.tensors.values()]
        values = [self.result[1] if self.result else None, self.penalty, *starts]
        values += [change.value for event in self.events for change in event.changes]
        try:
            for value in values:
                if value is not None:
                    check_indices(value, self.tensors)
        except SurgError as error:
            self.diagnostics.found += error.diagnostics

    def check_trained(self) -> None:
        """A gradient reaches what is trained."""
        assert self.result is not None
        form, value = self.result
        reached = gradients_reach(value) | (gradients_reach(self.rows) if self.rows else frozenset())
        for tensor in self.tensors.values():
            if tensor.role == "train" and tensor.name not in reached:
                message = f"`{tensor.name}` is trained, but no gradient reaches it from `{form}`"
                if value.operation == "filled":
                    message += ", which is the same whatever the tensors hold"
                advice = f"read `{tensor.name}` in `{form}`, or make it `frozen`, or a `state` that events change"
                self.diagnostics.error("SURG004", message, tensor.span, help=advice)

    def builder(self, occasion: Occasion | None = None, **more: Value) -> Builder:
        """What reads expressions; in an event, or with more names than those of the method."""
        return Builder({**self.names, **more}, occasion, self.used, self.earlier, tensors=self.tensors)

    def equation_of(self, node: nodes.Expr, **more: Value) -> Expression:
        """An expression that a forward computes, in training and in evaluation."""
        value = self.builder(None, training=TRAINING, **CLOCK, **more).expression(node)
        return without_zeros(with_clock(value, self.tensors))

    def read(self) -> None:
        readers: dict[type, Callable[[nodes.Statement], None]] = {
            nodes.Tensor: self.tensor,  # type: ignore[dict-item]
            nodes.Bind: self.bind,  # type: ignore[dict-item]
            nodes.Require: self.require,  # type: ignore[dict-item]
            nodes.Event: self.event,  # type: ignore[dict-item]
        }
        for statement in self.method.statements:
            try:
                readers[type(statement)](statement)
            except SurgError as error:
                self.diagnostics.found += error.diagnostics
                if error.diagnostics[0].code == "SURG028":  # what does not fit here need not have a shape here
                    self.result_span = self.result_span or statement.span
                    return
                if isinstance(statement, nodes.Bind | nodes.Tensor):  # later uses of the name are no second error
                    self.derived.setdefault(statement.name, statement.span)
                    self.poison(statement.name)
        if self.result is None and self.result_span is None:
            message = f"method `{self.method.name}` says nothing about the weight"
            self.diagnostics.error(
                "SURG006", message, self.method.span, help="end with `delta = ...`, `weight = ...` or `output = ...`"
            )
        if self.rows is not None and self.result is not None and self.result[0] == "output":
            message = "`input` is what `delta` and `weight` multiply; `output` says what it reads itself"
            self.diagnostics.error("SURG006", message, self.result_span, help="write it into the `output` equation")

    @property
    def whole_equation(self) -> str:
        """Everything that the site computes, for people."""
        return "; ".join((*self.steps, self.equation)) + self.input_equation + self.penalty_equation

    def poison(self, name: str) -> None:
        """A name whose definition failed: statements that use it are skipped without an error of their own."""
        if name not in RESERVED:  # those stay what they are
            self.names.pop(name, None)
        self.poisoned.add(name)

    def claim(self, name: str, span: Span | None) -> None:
        if name in RESERVED or name in SPECIAL or name == "bias":
            what = "is the result of a method" if name in SPECIAL else "is a reserved name"
            advice = "choose another name"
            if name == "W":
                advice = "`weight = ...` says what stands in its place, `delta = ...` what is added to it"
            raise fail("SURG003", f"`{name}` {what} and cannot be bound here", span, help=advice)
        if name in self.tensors or name in self.derived or any(p.name == name for p in self.method.parameters):
            first = self.tensors[name].span if name in self.tensors else self.derived.get(name)
            notes = [Note("the first one", first)] if first else []
            raise fail("SURG009", f"`{name}` is defined twice in `{self.method.name}`", span, notes=notes)
        if MARK in name:
            message = f"`{name}` is how a site calls a tensor of an earlier block, and cannot be bound"
            raise fail("SURG003", message, span)
        if name.endswith("_before"):
            raise fail("SURG003", f"`{name}` is how the step calls what `prev` reads, and cannot be bound", span)
        if name.endswith(KEPT):
            raise fail("SURG003", f"`{name}` is how a run calls what an event at the start reads", span)
        if name.endswith(GRADIENT):
            raise fail("SURG003", f"`{name}` is how the step calls a gradient, and cannot be bound", span)
        if name in (*STRUCTURES, *MEASURED, *STARTS, *SOURCES, *FUNCTIONS_IN_TIME):
            raise fail("SURG003", f"`{name}` is a function of the language and cannot be bound", span)

    def skips(self, *parts: nodes.Node | None) -> bool:
        return bool(self.poisoned) and any(part is not None and self.poisoned & names_in(part) for part in parts)

    def tensor(self, node: nodes.Tensor) -> None:
        self.claim(node.name, node.span)
        for name, what in ((node.name, "a tensor"), (node.shared_as or "", "a group of shared tensors")):
            if why := taken(name):
                raise fail("SURG003", f"{what} cannot be called `{name}`, {why}", node.span, help="choose another name")
        if self.skips(node.start):
            return self.poison(node.name)
        options = {}
        for option in node.options:
            if option.name not in ("lr", "weight_decay"):
                known = did_you_mean(option.name, ("lr", "weight_decay"))
                raise fail("SURG002", f"a tensor has no option `{option.name}`", option.span, help=known)
            if option.name in options:
                raise fail("SURG009", f"`{option.name}` is set twice", option.span)
            if node.role != "train":
                message = f"`{node.name}` is not trained, so `{option.name}` would do nothing"
                raise fail("SURG004", message, option.span, help=f"leave it out, or write `{node.name} = train ...`")
            constant = self.builder().number(option.value).constant
            if constant is not None and (constant < 0 or (constant == 0 and option.name == "lr")):
                bound = "above 0" if option.name == "lr" else "at least 0"
                raise fail("SURG004", f"`{option.name}` must be {bound}, not {float(constant):g}", option.value.span)
            options[option.name] = None if constant is None else float(constant)
        if node.shared_by not in (None, "model", "layer", "kind"):
            help_text = did_you_mean(node.shared_by, ("model", "layer", "kind"))
            raise fail(
                "SURG002",
                f"a tensor is shared by model, layer or kind, not `{node.shared_by}`",
                node.span,
                help=help_text,
            )
        start, shape = read_start(node, replace(self.builder(), earlier=None, tensors=None))
        tensor = TensorFormula(
            node.name, node.role, shape.shape, start, node.shared_by, node.shared_as,
            options.get("lr"), options.get("weight_decay"), node.span,
        )  # fmt: skip
        self.tensors[node.name] = tensor
        self.names[node.name] = named(tensor)

    def bind(self, node: nodes.Bind) -> None:
        if node.name == "input":
            return self.input(node)
        if node.name == "penalty":
            return self.read_penalty(node)
        if node.name in FORMS:
            if self.result_span is not None:
                notes = [Note("the first one", self.result_span)]
                message = f"`{self.method.name}` has two results"
                raise fail("SURG006", message, node.span, notes=notes, help="keep one of them")
            self.result_span = node.span
            if self.skips(node.value):
                return None
            value = self.activation("output", node, "out", ("x", "y")) if node.name == "output" else self.matrix(node)
            check_not_start(value)
            self.result = (node.name, value)
            self.equation = f"{node.name} = {show(node.value)}"
            if node.name == "delta":
                self.names["delta"] = value
            return None
        self.claim(node.name, node.span)
        if self.skips(node.value):
            return self.poison(node.name)
        self.names[node.name] = self.builder(None, training=TRAINING, **CLOCK).expression(node.value)
        self.derived[node.name] = node.span
        self.steps.append(f"{node.name} = {show(node.value)}")
        return None

    def matrix(self, node: nodes.Bind) -> Expression:
        """The value of `delta` or `weight`, `[out, in]`."""
        value = self.equation_of(node.value)
        wanted = (self.names["out"], self.names["in"])
        shape = tuple(part.value for part in wanted if isinstance(part, Expression) and part.value is not None)
        if len(value.shape) != 2 or any(a.differs_from(b) for a, b in zip(value.shape, shape, strict=True)):
            message = f"`{node.name}` must be {spelt(shape)}, this is {spelt(value.shape)}"
            square = value.shape in (shape[:1] * 2, shape[1:] * 2) and shape[0].whole is None
            advice = "a method for square weights alone says `requires in == out`" if square else None
            raise fail("SURG005", message, node.value.span, help=advice)
        return value

    def input(self, node: nodes.Bind) -> None:
        if self.rows is not None:
            raise fail("SURG009", "`input` is bound twice", node.span)
        self.rows = self.activation("input", node, "in", ("x",))
        dropped = self.rows.arguments[0] if self.rows.operation == "dropout" else self.rows
        if dropped.operation != "x":  # dropout is no part of the equation that people compare
            self.input_equation = f"; input = {show(node.value)}"

    def read_penalty(self, node: nodes.Bind) -> None:
        """A number of the site's tensors and of the clock."""
        if self.penalty_equation:
            raise fail("SURG009", "`penalty` is bound twice", node.span, help="add the two up")
        self.penalty_equation = f"; penalty = {show(node.value)}"
        if self.skips(node.value):
            return
        value = without_zeros(self.builder(None, **CLOCK).expression(node.value))
        check_not_start(value)
        if value.value == Quantity.of(0):  # its weights are: there is none
            return
        if value.shape:
            message = f"`penalty` is a number, this is {spelt(value.shape)}"
            raise fail("SURG005", message, node.value.span, help="reduce it: `sum(...)`, `mean(...)`, `fro(...)`")
        trained = {tensor.name for tensor in self.tensors.values() if tensor.role == "train"}
        if not gradients_reach(value) & trained:
            raise fail("SURG004", "`penalty` reaches nothing that is trained, so it changes nothing", node.value.span)
        self.penalty = value

    def activation(self, name: str, node: nodes.Bind, size: str, leaves: tuple[str, ...]) -> Expression:
        """The rows that `input` or `output` stands for, `[tokens, size]`."""
        sizes = {leaf: self.names["in" if leaf == "x" else "out"].value for leaf in leaves}  # type: ignore[union-attr]
        more = {leaf: rows(leaf, length) for leaf, length in sizes.items() if length is not None}
        value = self.equation_of(node.value, **more)
        wanted = self.names[size]
        assert isinstance(wanted, Expression) and wanted.value is not None
        shape = (TOKENS, wanted.value)
        if len(value.shape) != 2 or any(a.differs_from(b) for a, b in zip(value.shape, shape, strict=True)):
            message = f"`{name}` must be {spelt(shape)}, this is {spelt(value.shape)}"
            raise fail("SURG005", message, node.value.span)
        if value.operation == "filled" and TOKENS in value.shape:  # nothing but what there is no earlier block for
            leaf = rows("x" if name == "input" else "y", wanted.value)
            return Expression("multiply", (number(Quantity.of(0)), leaf), leaf.shape, span=node.value.span)
        if not reads_rows(value):
            raise fail("SURG004", f"`{name}` reads neither of {' and '.join(leaves)}", node.value.span)
        if found := misplaced(value):
            advice = "`@` with a matrix on the right, slices of columns and functions of an entry treat rows alone"
            raise fail("SURG004", found[1], found[0].span or node.value.span, help=advice)
        return value

    def require(self, node: nodes.Require) -> None:
        if self.skips(node.condition) or self.builder().condition(node.condition).value is not False:
            return
        values = {name: getattr(self.names.get(name), "value", None) for name in sorted(names_in(node.condition))}
        here = " and ".join(f"{name} = {value}" for name, value in values.items() if value is not None)
        message = f"`{self.method.name}` requires {show(node.condition)}, but here {here}"
        raise fail("SURG028", message, node.condition.span)

    def event(self, node: nodes.Event) -> None:
        found = read_event(self, node)
        if found is not None:
            self.events.append(found)


def elaborate(
    method: nodes.Method, arguments: Mapping[str, Value], sizes: Mapping[str, Quantity]
) -> tuple[MethodFormula | None, Diagnostics]:
    """The formula of a method; `sizes` has `in` and `out` and may have coordinates (`layer`, `sites` ...).

    Returns None with the diagnostics if anything is wrong. A requirement `in == out` makes both one symbol.
    """
    names: dict[str, Value] = dict(arguments)
    names.update({name: number(value) for name, value in sizes.items() if not name.startswith("earlier")})
    if is_square(method) and sizes["in"].constant is None:
        names["out"] = names["in"]
    out, inside = names["out"], names["in"]
    assert isinstance(out, Expression) and isinstance(inside, Expression)
    assert out.value is not None and inside.value is not None
    names["W"] = Expression("weight", (), (out.value, inside.value), name="W")
    reader = _Reader(method, names)
    if sizes["in"].constant is not None:
        reader.earlier = lambda back: back.whole is None or coordinate(back.whole) in sizes
    for parameter in method.parameters:
        if parameter.name in RESERVED or parameter.name in SPECIAL:
            reader.diagnostics.error("SURG003", f"`{parameter.name}` is a reserved name", parameter.span)
    reader.read()
    if not reader.diagnostics.errors:
        reader.check_indices()
        if reader.result is not None and sizes["in"].constant is None:  # else an earlier block may be missing
            reader.check_trained()
    if reader.diagnostics.errors or reader.result is None:
        return None, reader.diagnostics
    form, expression = reader.result
    terms = () if form == "output" else (Term(expression, reader.rows or rows("x", inside.value)),)
    rank = names.get("rank")
    coordinates = frozenset(name for name in reader.used if name in COORDINATES or name.startswith("earlier_"))
    return MethodFormula(
        method.name, tuple(reader.tensors.values()), form, expression, terms,
        tuple(reader.events), reader.whole_equation,
        rank.value.whole if isinstance(rank, Expression) and rank.value is not None else None,
        coordinates, method.span, (out.value, inside.value), reader.penalty,
    ), reader.diagnostics  # fmt: skip


def is_square(method: nodes.Method) -> bool:
    """Whether it requires `in == out`."""
    wanted = (nodes.Name("in"), nodes.Name("out"))
    return any(
        isinstance(statement, nodes.Require)
        and isinstance(statement.condition, nodes.Binary)
        and statement.condition.operator == "=="
        and (statement.condition.left, statement.condition.right) in (wanted, wanted[::-1])
        for statement in method.statements
    )
