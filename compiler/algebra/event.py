"""An event of a method to its condition and its changes: `after step when step > 5 { W += delta;  reset A, B }`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.compiler import nodes
from surgery.compiler.algebra.build import Value
from surgery.compiler.algebra.condition import ALWAYS, Condition
from surgery.compiler.algebra.expression import GRADIENT, MARK, Expression, negated, number, rewriting
from surgery.compiler.algebra.formula import AT_START, ChangeFormula, EventFormula, Start
from surgery.compiler.algebra.in_time import Occasion
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.shapes import spelt
from surgery.compiler.algebra.sources import check_not_start, walk
from surgery.compiler.algebra.structures.decomposition import PARTS as DECOMPOSITIONS
from surgery.compiler.diagnostics import did_you_mean, fail
from surgery.compiler.printer import show

if TYPE_CHECKING:
    from surgery.compiler.algebra.method import _Reader

CLOCK: dict[str, Value] = {name: number(Quantity.symbol(name)) for name in ("step", "steps")}
KEPT = "_at_start"  # behind the name of a tensor: as it was when the step was made
PHASES = ("before forward", "after backward", "after step")


def read_event(reader: _Reader, node: nodes.Event) -> EventFormula | None:
    """The event, or None where it reads a name whose definition is wrong; raises located `SurgError`s."""
    if (node.phase, node.point) == ("at", "start"):
        return _correction(reader, node)
    phase = "after step" if node.phase == "every" else f"{node.phase} {node.point}"
    if phase not in PHASES:
        known = did_you_mean(phase, PHASES) or f"the points of a step are: {', '.join(PHASES)}"
        raise fail("SURG002", f"a step has no point `{phase}`", node.span, help=known)
    if reader.skips(node.interval, node.when, *node.changes):
        return None
    when = reader.builder(None, **CLOCK).condition(node.when) if node.when else ALWAYS
    if node.interval is not None:
        when = _every(reader, node.interval, None if when == ALWAYS else when)
    changes = [change for written in node.changes for change in _changes(reader, written, phase)]
    return EventFormula(phase, when, tuple(changes), show(node), node.span)


def _every(reader: _Reader, interval: nodes.Expr, when: Condition | None) -> Condition:
    """Every N steps: after step N - 1, 2 N - 1 ..., steps counted from 0."""
    period = reader.builder().size(interval)
    if period.constant is not None and period.constant < 1:
        raise fail("SURG004", f"an interval is at least one step, not {period}", interval.span)
    step = Quantity.symbol("step")
    due = Condition("==", ((step + Quantity.of(1)) % period, Quantity.of(0)))
    return due if when is None else Condition("and", (due, when))


def _correction(reader: _Reader, node: nodes.Event) -> EventFormula | None:
    """`at start { W -= delta }`: what it reads of trained tensors and states is kept as it was at the start."""
    if node.when is not None:
        raise fail("SURG004", "an event at the start happens always, so it takes no `when`", node.when.span)
    changes = []
    for change in node.changes:
        if not isinstance(change, nodes.Change) or change.target != "W":
            help_text = "a tensor has its start where it is defined"
            raise fail("SURG007", "an event at the start assigns to W alone", change.span, help=help_text)
        if change.operator not in ("=", "+=", "-="):
            raise fail("SURG004", "an event at the start sets W, adds to it or subtracts", change.span)
        if reader.skips(change):
            return None
        value = reader.builder().expression(change.value)
        check_not_start(value)
        target = reader.names["W"]
        assert isinstance(target, Expression)
        if _differs(value, target):
            message = f"`W` is {spelt(target.shape)}, the value is {spelt(value.shape)}"
            raise fail("SURG005", message, change.value.span)
        own = rewriting(lambda part: _kept(reader, part))(value)
        changes.append(ChangeFormula("W", change.operator, own, change.span))
    return EventFormula(AT_START, ALWAYS, tuple(changes), show(node), node.span)


def _kept(reader: _Reader, node: Expression) -> Expression:
    """A tensor's copy, made with the start of the run, where the tensor itself changes later."""
    if MARK in node.name:
        raise fail("SURG008", "an event at the start that reads an earlier block is not built yet", node.span)
    own = reader.tensors.get(node.name) if node.operation == "tensor" else None
    if node.operation == "tensor" and own is None:
        raise fail("SURG007", "an event at the start reads the tensors of its own site", node.span)
    if own is not None and own.role != "frozen":
        copy = f"{node.name}{KEPT}"
        start = Start("expression", (), node, f"{node.name} as it starts")
        kept = replace(own, role="frozen", name=copy, start=start, lr=None, weight_decay=None)
        reader.tensors.setdefault(copy, kept)
        return replace(node, name=copy)
    return node


def _changes(reader: _Reader, node: nodes.Change | nodes.Reset, phase: str) -> list[ChangeFormula]:
    """A statement, behind the changes of state that it needs."""
    if isinstance(node, nodes.Reset):
        return [_reset(reader, node, name) for name in node.targets]
    _check_target(reader, node.target, node, "W, a trained tensor or a state")
    target, occasion = reader.names.get(node.target), Occasion(phase, reader.tensors)
    value = reader.builder(occasion, **CLOCK).expression(node.value)
    check_not_start(value)
    assert isinstance(target, Expression)
    if not (not value.shape and node.operator != "=") and _differs(value, target):
        message = f"`{node.target}` is {spelt(target.shape)}, the value is {spelt(value.shape)}"
        raise fail("SURG005", message, node.value.span)
    if node.operator == "-=":
        value, node = negated(value), replace(node, operator="+=")
    return [*occasion.changes, ChangeFormula(node.target, node.operator, value, node.span)]


def _reset(reader: _Reader, node: nodes.Reset, name: str) -> ChangeFormula:
    """`reset A`: its start again, by another draw, or computed from W and the tensors as they are by then."""
    _check_target(reader, name, node, "a trained tensor or a state")
    if name == "W":
        raise fail("SURG007", "`reset` starts a tensor of the method anew, and W has no start", node.span)
    start = reader.tensors[name].start.expression
    for part in () if start is None else walk(start):
        if part.operation in (*DECOMPOSITIONS, "weight_of", "gradient", "activations"):
            message = f"`{name}` starts from a decomposition, a checkpoint or data, which a step has no time for"
            raise fail("SURG007", message, node.span, help="`reset` draws a start again, or computes it from W")
    known = reader.names[name]
    assert isinstance(known, Expression)
    return ChangeFormula(name, "reset", known if start is None else start, node.span)


def _check_target(reader: _Reader, name: str, node: nodes.Line, what: str) -> None:
    """Only what a step may change is assigned to."""
    tensor = reader.tensors.get(name)
    if name != "W" and (tensor is None or tensor.role == "frozen"):
        known = [name for name, tensor in reader.tensors.items() if tensor.role != "frozen"] + ["W"]
        message = f"an event assigns to {what}, not to `{name}`"
        raise fail("SURG007", message, node.span, help=did_you_mean(name, known))
    if tensor is not None and tensor.shared_by:
        raise fail("SURG008", "an event that assigns to a shared tensor is not built yet", node.span)


def _differs(value: Expression, target: Expression) -> bool:
    return len(value.shape) != len(target.shape) or any(
        a.differs_from(b) for a, b in zip(value.shape, target.shape, strict=True)
    )


def gradients_read(node: Expression) -> set[str]:
    """Names of the tensors whose gradients occur in an expression."""
    names = {part.name for part in walk(node) if part.operation == "tensor"}
    return {name.removesuffix(GRADIENT) for name in names if name.endswith(GRADIENT)}


def reads_gradient(node: Expression) -> bool:
    """Whether the gradient of a tensor occurs in an expression."""
    return bool(gradients_read(node))
