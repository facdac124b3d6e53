"""Delta-LoRA's sum in closed form (arXiv:2309.02411, Algorithm 1; language.md, "two exact readings").

`W += ratio * (delta - prev(delta))` at every step from the first whose condition holds adds up to
`ratio * (delta - delta_S)`, with delta_S the value at the start of that step. Read without touching W, the site
multiplies with `W + delta + ratio * stop(delta - delta_S)`: tensors get the gradient of delta alone, x that of the
whole. Read with W in place, W is `W_start + ratio * (delta - delta_S)`, rounded once however many steps there were.
"""

from __future__ import annotations

from dataclasses import replace

from surgery.compiler.algebra.expression import MARK, Expression, negated, rewriting, without_gradient
from surgery.compiler.algebra.facts import reads_weight, tensors_read
from surgery.compiler.algebra.formula import EventFormula, MethodFormula, Start, TensorFormula, Term, rows
from surgery.compiler.algebra.low_rank import factor, structure
from surgery.compiler.algebra.narrow import without_numbers
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.schedule import reads_clock

SWITCH = "telescope"  # 0 until the snapshot is taken, then the ratio


def summed(event: EventFormula) -> tuple[Quantity, Expression] | None:
    """The ratio and D, if the event is `W += ratio * (D - prev(D))` and nothing else."""
    if len(event.changes) != 1 or event.changes[0].target != "W" or event.changes[0].operator != "+=":
        return None
    value, ratio = event.changes[0].value, Quantity.of(1)
    if value.operation == "multiply":
        left, right = value.arguments
        number, value = (left.value, right) if left.value is not None else (right.value, left)
        if number is None:
            return None
        ratio = number
    if value.operation != "subtract":
        return None
    now, before = value.arguments
    return (ratio, now) if before.operation == "previous" and before.arguments[0] == now else None


def why_not(formula: MethodFormula) -> str | None:
    """Why the telescoped reading is not exact for this method, or None if it is."""
    moving = [event for event in formula.events if event.moves_base]
    if formula.form != "delta":
        return "only a `delta` telescopes"
    if len(moving) != 1:
        return "several events move W"
    (event,) = moving
    if event.from_start:  # it is that closed form
        return None
    found = summed(event)
    if found is None:
        return "the event is not `W += ratio * (delta - prev(delta))`"
    ratio, moved = found
    if reads_clock(ratio):
        return "the ratio is not constant"
    if not event.when.stays_true:
        return "its condition can become false again"
    if any(MARK in name for name in tensors_read(moved)):
        return "it reads tensors of another block"
    if reads_weight(formula.expression) or reads_weight(moved):
        return "delta reads W"
    taken = {*snapshot_names(formula).values(), switch_name(formula)} & {tensor.name for tensor in formula.tensors}
    if taken:
        return f"a tensor is called `{min(taken)}`, which is the name of a state of the telescope"
    written = {change.target for other in formula.events for change in other.changes if other is not event}
    if written & tensors_read(moved):
        return "another event assigns to a tensor of delta"
    return None


def _moving(formula: MethodFormula) -> Expression:
    """D of the event that moves W."""
    return _sum(formula)[1]


def _sum(formula: MethodFormula) -> tuple[Quantity, Expression]:
    """The ratio and D of the event that moves W."""
    return next(known for event in formula.events if event.moves_base and (known := summed(event)))


def snapshot_names(formula: MethodFormula) -> dict[str, str]:
    """Tensor to the state that keeps its value from the start of the first step of the sum."""
    return {name: f"{name}_start" for name in sorted(tensors_read(_moving(formula)) & formula.trained)}


def switch_name(formula: MethodFormula) -> str:
    """The state that holds the ratio once the sum has begun; beside the tensors that it is a sum of."""
    owner = max(tensors_read(_moving(formula)), default="").rpartition(".")[0]
    return f"{owner}.{SWITCH}" if owner else SWITCH


def telescoped(formula: MethodFormula) -> MethodFormula:
    """The method with its W-moving event replaced by the closed form; the snapshot and the switch are state."""
    names, moving = snapshot_names(formula), _moving(formula)
    delta = formula.expression
    switch = Expression("tensor", (), (), name=switch_name(formula))
    state = [*_snapshots(formula), TensorFormula(switch.name, "state", (), Start("zeros", text="zeros"))]
    plain = rows("x", delta.shape[1])  # W meets x itself, whatever the method's input is
    grows = _sum(formula)[0] != Quantity.of(-1)  # there 1 + s is 0, and nothing can be divided by it
    whole = delta == moving and formula.reads_plain_x and grows
    expression = _one_product(moving, names, switch) if whole else None
    if expression is None:
        change = _since_start(moving, names)
        if factors := factor(change):  # one product of twice the rank instead of two
            change = Expression("matmul", factors, delta.shape)
        moved = _times(switch, without_gradient(change))
        expression = _plus(delta, moved)
        terms = (Term(expression, plain),) if formula.reads_plain_x else (*formula.terms, Term(moved, plain))
    else:
        terms = (Term(expression, plain),)
    return replace(
        formula,
        tensors=(*formula.tensors, *state),
        expression=replace(expression, span=delta.span),
        terms=terms,
        events=tuple(event for event in formula.events if not event.moves_base),
    )


def _one_product(delta: Expression, names: dict[str, str], switch: Expression) -> Expression | None:
    """`delta + s * stop(delta - delta_S)` for `delta = L @ R` as one product of twice the rank.

        [L + s * stop(L), -s * L_S] @ [stop(R) + (R - stop(R)) / (1 + s); R_S]

    The left factor grows with s, so the right one's gradient is that much too large and is divided by it.
    """
    factors = factor(delta)
    if factors is None:
        return None
    (left_scale, left), (right_scale, right) = map(without_numbers, factors)
    old_left, old_right = (_at_snapshot(side, names) for side in (left, right))
    grown = _plus(Expression("number", value=Quantity.of(1)), switch)
    gradient = Expression("subtract", (right, without_gradient(right)), right.shape)
    shrunk = Expression("divide", (gradient, grown), right.shape)
    minus_old = negated(_times(switch, without_gradient(old_left)))
    wide = structure("hstack", _plus(left, _times(switch, without_gradient(left))), minus_old)
    tall = structure("vstack", _plus(without_gradient(right), shrunk), without_gradient(old_right))
    scale = Expression("number", value=Quantity.of(left_scale * right_scale))
    return _times(scale, Expression("matmul", (wide, tall), delta.shape))


def _plus(left: Expression, right: Expression) -> Expression:
    return Expression("add", (left, right), left.shape)


def _times(number: Expression, matrix: Expression) -> Expression:
    return Expression("multiply", (number, matrix), matrix.shape)


def from_start(formula: MethodFormula) -> MethodFormula:
    """The method with its W-moving event as a sum from the start of the run; the snapshot is state."""
    names, moving = snapshot_names(formula), _moving(formula)

    def closed(event: EventFormula) -> EventFormula:
        found = summed(event) if event.moves_base else None
        if found is None:
            return event
        (change,), ratio = event.changes, Expression("number", value=found[0])
        value = Expression("multiply", (ratio, _since_start(moving, names)), moving.shape)
        return replace(event, changes=(replace(change, value=value),), from_start=True)

    tensors = (*formula.tensors, *_snapshots(formula))
    return replace(formula, tensors=tensors, events=tuple(map(closed, formula.events)))


def _snapshots(formula: MethodFormula) -> list[TensorFormula]:
    known = {tensor.name: tensor for tensor in formula.tensors}
    zeros = Start("zeros", text="zeros")
    return [
        TensorFormula(new, "state", known[old].shape, zeros, span=known[old].span)
        for old, new in snapshot_names(formula).items()
    ]


def _since_start(moving: Expression, names: dict[str, str]) -> Expression:
    """`D - D_S`: D less what it was at the snapshot, whose tensors are `names`."""
    return Expression("subtract", (moving, _at_snapshot(moving, names)), moving.shape)


def _at_snapshot(node: Expression, names: dict[str, str]) -> Expression:
    at_snapshot = rewriting(lambda part: replace(part, name=names[part.name]) if part.name in names else part)
    return at_snapshot(node)
