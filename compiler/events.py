"""Events as programs of the step: each statement a small graph over one site's tensors, with its condition."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from surgery.compiler.algebra.base import logical, stacked, stored_like
from surgery.compiler.algebra.condition import ALWAYS, Condition
from surgery.compiler.algebra.evaluate import Evaluator, wider
from surgery.compiler.algebra.expression import BEFORE, Expression, Shape
from surgery.compiler.algebra.facts import is_scalar
from surgery.compiler.algebra.formula import AT_START, ChangeFormula, EventFormula, MethodFormula
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.low_rank import factor
from surgery.compiler.algebra.quantity import Quantity, value_of
from surgery.compiler.algebra.recorder import Recorder, identifier
from surgery.compiler.algebra.telescope import snapshot_names, summed, switch_name
from surgery.compiler.plan import Plan, Site


@dataclass(frozen=True)
class EventProgram:
    """One statement of an event, for all sites of one size.

    `graph` has a placeholder per tensor it reads or writes ("W", "A", and "A_before" for the value that was kept at
    the start of the step) and works in place; `sites` names, per site, the weight behind each placeholder.
    """

    comment: str
    phase: str  # "start" (before everything else in the step) or "after step"
    condition: str  # Python over the whole numbers `step` and `steps`
    keep: tuple[str, ...]  # placeholders to copy at the start of a step whose condition holds
    function: str
    graph: fx.Graph = field(compare=False)
    sites: tuple[dict[str, str], ...] = ()


def programs(plan: Plan) -> tuple[EventProgram, ...]:
    """The plan's events in the order in which the step runs them."""
    found: list[EventProgram] = []
    for key in plan.formulas:
        sites = [site for site in plan.sites if site.formula == key]
        if not sites:
            continue
        formula = instance(plan, key)
        if plan.formulas[key].telescope:
            found.append(_snapshot(_original(plan, key), sites))
        for event in formula.events:
            if event.phase == AT_START:  # done when the step is made
                continue
            for number, change in enumerate(event.changes):
                found += [_program(formula, event, change, number, alike) for alike in _stored_alike(sites)]
    return tuple(found)


def _stored_alike(sites: list[Site]) -> list[list[Site]]:
    """Sites of one formula by how their W and their tensors are stored, which the operations on them depend on."""
    found: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        stored = (site.module_class, site.transposed, site.experts, site.kernel, site.dtype)
        key = (*stored, *(tensor.dtype for tensor in site.tensors))
        found.setdefault(key, []).append(site)
    return list(found.values())


def _original(plan: Plan, key: str) -> MethodFormula:
    literal = plan.formulas[key].model_copy(update={"telescope": False})
    return instance(plan.model_copy(update={"formulas": {key: literal}}), key)


def _comment(event: EventFormula) -> str:
    place = f"{event.span.file}:{event.span.line}: " if event.span else ""
    return place + event.text


def _snapshot(formula: MethodFormula, sites: list[Site]) -> EventProgram:
    """The telescope's snapshot: at the start of the first step whose condition holds, what delta was is kept."""
    (event,) = (event for event in formula.events if event.moves_base)
    found = summed(event)
    assert found is not None
    recorder = Recorder()
    for name, copy in snapshot_names(formula).items():
        recorder[copy].copy_(recorder[name])
    recorder[switch_name(formula)].fill_(float(value_of(found[0])))
    comment = f"{_comment(event)}, read as its closed form: W stays, the start of the sum is kept"
    return EventProgram(
        comment, "start", _first(event.when), (), f"{formula.name}_snapshot", recorder.finish(),
        tuple(_names(recorder, site) for site in sites),
    )  # fmt: skip


def _first(when: Condition) -> str:
    """True at the first step of a condition that stays true: now, and not at the step before."""
    if when == ALWAYS or when.value is True:
        return "step == 0"
    return f"({when.source}) and (step == 0 or not ({_at_previous_step(when).source}))"


def _at_previous_step(when: Condition) -> Condition:
    one = Quantity.of(1)

    def earlier(part: Condition | Quantity | str | bool) -> Condition | Quantity | str | bool:
        if isinstance(part, Condition):
            return _at_previous_step(part)
        # the condition stays true, so `step` stands alone on one side with factor one
        if isinstance(part, Quantity) and "step" in part.symbols:
            return part - one
        return part

    return Condition(when.operator, tuple(earlier(part) for part in when.parts))


def _program(
    formula: MethodFormula, event: EventFormula, change: ChangeFormula, number: int, sites: list[Site]
) -> EventProgram:
    recorder = Recorder()
    dtype = wider(getattr(torch, sites[0].dtype))

    def base() -> Any:
        return logical(cast(torch.Tensor, recorder["W"]), sites[0])

    evaluator = Evaluator(base, recorder, dtype, _dtypes(sites[0]), stacked(sites[0]))
    if change.target == "W":
        _move(recorder["W"], sites[0], change, formula.shape, evaluator)
    else:
        _write(recorder[change.target], change.operator, evaluator(change.value))
    keep = tuple(identifier(name) for name in recorder.inputs if name.endswith(BEFORE))
    suffix = f"_{number + 1}" if len(event.changes) > 1 else ""
    return EventProgram(
        _comment(event), "after step", event.when.source, tuple(name.removesuffix(BEFORE) for name in keep),
        f"{formula.name}_after_step{suffix}", recorder.finish(), tuple(_names(recorder, site) for site in sites),
    )  # fmt: skip


def _move(stored: fx.Proxy, site: Site, change: ChangeFormula, shape: Shape, evaluator: Evaluator) -> None:
    """W in place, as it is stored; a sum of bounded rank is one product added into it, never a matrix of its own."""
    value = change.value
    if site.module_class in ("Conv2d", "Norm"):  # no view of what is stored is W
        zeros = Expression("filled", (), shape, value=Quantity.of(0))
        whole = value if value.shape == shape else Expression("add", (zeros, value), shape)
        _write(stored, change.operator, stored_like(evaluator(whole), site))
        return
    target = logical(cast(torch.Tensor, stored), site)
    factors = factor(value) if change.operator == "+=" and not is_scalar(value) else None
    if factors is None:
        _write(target, change.operator, evaluator.lifted(value, 2))
    elif site.experts is None:
        target.addmm_(*map(evaluator, factors))
    elif all(map(evaluator.is_stacked, factors)):
        target.baddbmm_(*map(evaluator, factors))
    else:
        _write(target, change.operator, evaluator(value))


def _write(target: Any, operator: str, value: Any) -> None:
    """A tensor in place."""
    getattr(target, {"=": "copy_", "+=": "add_", "*=": "mul_"}[operator])(value)


def _dtypes(site: Site) -> dict[str, torch.dtype]:
    known = {tensor.name: getattr(torch, tensor.dtype) for tensor in site.tensors}
    return known | {f"{name}{BEFORE}": dtype for name, dtype in known.items()}


def _names(recorder: Recorder, site: Site) -> dict[str, str]:
    keys = {tensor.name: tensor.key for tensor in site.tensors} | {"W": site.parameter} | site.earlier
    found = {}
    for name, proxy in recorder.inputs.items():
        target = identifier(name.removesuffix(BEFORE)) if name.endswith(BEFORE) else str(proxy.node.target)
        found[target] = keys[name.removesuffix(BEFORE)]
    return found
