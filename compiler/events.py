"""Events as programs of the step: each statement a small graph over one site's tensors, with its condition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx, nn

from surgery.compiler.algebra.base import logical, stacked, stored_like
from surgery.compiler.algebra.condition import ALWAYS, Condition
from surgery.compiler.algebra.evaluate import Evaluator, wider
from surgery.compiler.algebra.event import KEPT as AT_START_SUFFIX
from surgery.compiler.algebra.expression import BEFORE, GRADIENT, MARK, Expression, Shape
from surgery.compiler.algebra.facts import is_scalar
from surgery.compiler.algebra.formula import AT_START, ChangeFormula, EventFormula, MethodFormula
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.moved import Moved, moved
from surgery.compiler.algebra.quantity import CLOCK, Quantity, value_of
from surgery.compiler.algebra.recorder import Recorder
from surgery.compiler.algebra.sources import walk
from surgery.compiler.algebra.telescope import snapshot_names, summed, switch_name
from surgery.compiler.event_program import GRAD, KEPT, START, EventProgram, Move, Redraw
from surgery.compiler.plan import Plan, Site
from surgery.compiler.span import Span

BESIDE = {BEFORE: KEPT, AT_START_SUFFIX: START, GRADIENT: GRAD}  # by the end of the name of a placeholder
OPERATORS = {"=": "copy_", "+=": "add_", "*=": "mul_"}
ACROSS = ("keep_top", "quantile")


def programs(plan: Plan) -> tuple[EventProgram, ...]:
    """The plan's events as the step runs them: each statement at all sites of a rule, then the next."""
    found: list[EventProgram] = []
    for rule in dict.fromkeys(site.rule for site in plan.sites):
        sites = [site for site in plan.sites if site.rule == rule]
        lists = []
        for key in dict.fromkeys(site.formula for site in sites):
            own = [site for site in sites if site.formula == key]
            if plan.formulas[key].telescope or plan.formulas[key].from_start:
                found.append(_snapshot(_original(plan, key), own, plan.formulas[key].telescope))
            lists.append(list(_of_formula(plan, instance(plan, key), own, rule)))
        order = [place for place, _ in max(lists, key=len, default=[])]  # a telescope leaves events out
        found += [program for place in dict.fromkeys(order) for one in lists for at, program in one if at == place]
    return (*_clock(plan), *found, *_penalties(plan))


def _clock(plan: Plan) -> list[EventProgram]:
    """Numbers of the step that equations read: written before each forward."""
    found: dict[str, EventProgram] = {}
    for site in plan.sites:
        known = {tensor.name: tensor for tensor in instance(plan, site.formula).tensors}
        for tensor in site.tensors:
            number = known[tensor.name].start.clock
            if number is not None:
                found.setdefault(tensor.key, EventProgram(
                    "", "before forward", "True", "", Recorder().finish(), ({tensor.name: tensor.key},),
                    fills=str(number), writes=(tensor.name,),
                ))  # fmt: skip
    return list(found.values())


def _of_formula(
    plan: Plan, formula: MethodFormula, sites: list[Site], rule: int
) -> Iterator[tuple[tuple[object, ...], EventProgram]]:
    """The programs of one formula, each with its place in the order of the method's statements."""
    for event in formula.events:
        if event.phase == AT_START:  # done when the step is made
            continue
        runs = _runs(event.changes)
        for number, run in enumerate(runs):
            place = (event.text, event.span, run[0].target, number)
            suffix = f"_{number + 1}" if len(runs) > 1 else ""
            for alike in _stored_alike(sites):
                program = _program(formula, event, run, alike, plan.step.seed)
                joined = (rule, *place) if program.across else ()
                yield place, replace(program, function=f"{program.function}{suffix}", joined=joined)


def _runs(changes: Sequence[ChangeFormula]) -> list[list[ChangeFormula]]:
    """Statements that touch nothing but their own site's tensors run together, all others alone."""
    runs: list[list[ChangeFormula]] = []
    for change in changes:
        if runs and _is_own(change) and _is_own(runs[-1][-1]):
            runs[-1].append(change)
        else:
            runs.append([change])
    return runs


def _is_own(change: ChangeFormula) -> bool:
    assigned = change.operator in OPERATORS and change.target != "W"
    return assigned and not any(MARK in part.name for part in walk(change.value))


def _penalties(plan: Plan) -> list[EventProgram]:
    """What the methods add to the loss of a step, site by site; what reads nothing of a site's own counts once."""
    found: list[EventProgram] = []
    known: set[tuple[object, ...]] = set()
    for key in plan.formulas:
        formula = instance(plan, key)
        sites = [site for site in plan.sites if site.formula == key]
        if (penalty := formula.penalty) is None:
            continue
        for alike in _stored_alike(sites):
            recorder, evaluator = _evaluator(alike[0])
            value = evaluator(penalty)
            graph = recorder.finish((value,))
            own = []
            for site in alike:
                names = _names(recorder, site)
                same = (str(fx.GraphModule(nn.Module(), graph).code), *names.items())
                own += [] if same in known else [names]
                known.add(same)
            if own:
                said = f"{_place(penalty.span)}penalty of {formula.name}"
                found.append(EventProgram(said, "penalty", "True", f"{formula.name}_penalty", graph, tuple(own)))
    return found


def _evaluator(site: Site) -> tuple[Recorder, Evaluator]:
    """What records expressions over a site's tensors and W."""
    recorder = Recorder([tensor.name for tensor in site.tensors])

    def base() -> Any:
        return logical(cast(torch.Tensor, recorder["W"]), site)

    dtype = wider(getattr(torch, site.dtype))
    return recorder, Evaluator(base, recorder, dtype, _dtypes(site), stacked(site))


def _stored_alike(sites: list[Site]) -> list[list[Site]]:
    """Sites of one formula by how their W and their tensors are stored, which the operations on them depend on."""
    found: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        stored = (site.module_class, site.transposed, site.experts, site.kernel, site.dtype)
        key = (*stored, *(tensor.dtype for tensor in site.tensors))
        found.setdefault(key, []).append(site)
    return list(found.values())


def _original(plan: Plan, key: str) -> MethodFormula:
    literal = plan.formulas[key].model_copy(update={"telescope": False, "from_start": False})
    return instance(plan.model_copy(update={"formulas": {key: literal}}), key)


def _comment(event: EventFormula) -> str:
    return _place(event.span) + event.text


def _place(span: Span | None) -> str:
    return f"{span.file}:{span.line}: " if span else ""


def _snapshot(formula: MethodFormula, sites: list[Site], telescope: bool) -> EventProgram:
    """At the start of the first step whose condition holds, what delta is is kept: from there the sum counts."""
    (event,) = (event for event in formula.events if event.moves_base)
    found = summed(event)
    assert found is not None
    recorder = Recorder()
    for name, copy in snapshot_names(formula).items():
        recorder[copy].copy_(recorder[name])
    if telescope:
        recorder[switch_name(formula)].fill_(float(value_of(found[0])))
    said = "W stays, the start of the sum is kept" if telescope else "the start of the sum is kept"
    return EventProgram(
        f"{_comment(event)}, read as its closed form: {said}", "start", _first(event.when),
        f"{formula.name}_snapshot", recorder.finish(), tuple(_names(recorder, site) for site in sites),
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
    formula: MethodFormula, event: EventFormula, run: Sequence[ChangeFormula], sites: list[Site], seed: int
) -> EventProgram:
    recorder, evaluator = _evaluator(sites[0])
    change, last = run[0], run[-1]
    move = result = None
    written: tuple[str, ...] = ()
    across, number, redraws = "", "", None
    if change.target == "W" and (found := _narrow(change, sites[0])):
        times = "" if found.times is None else str(found.times)
        move = Move(found.scale, f"W{AT_START_SUFFIX}" if event.from_start else "W", sites[0].transposed, times)
        result, written = _factors(found, recorder, evaluator), ("W", move.source)
    elif change.target == "W":
        start = recorder[f"W{AT_START_SUFFIX}"] if event.from_start else None
        _move(recorder["W"], start, sites[0], change, formula.shape, evaluator)
    elif change.operator in ACROSS:
        across, number, written = change.operator, str(change.number), (change.target,)
        if across == "keep_top" and stacked(sites[0]):
            number += f", axes={len(change.value.shape)}"
        result = (recorder[name] if (name := _stored_name(change.value)) else evaluator(change.value),)
    elif change.operator == "reset" and change.value.operation == "tensor":
        written, redraws = (change.target,), _redraw(formula, change.target, seed)
    else:
        for each in run:  # a later statement reads what an earlier one wrote
            target, value = recorder[each.target], replace(evaluator, _known={})(each.value)
            if each.value.operation == "number" and each.operator == "=":
                cast(Any, target).fill_(value)
            else:
                _write(target, "=" if each.operator == "reset" else each.operator, value)
    forgets = last.operator == "reset"
    writes = ("W",) if move else (last.target,) if written or forgets else ()
    since = f", summed since its start: W from `W{START}`, rounded once" if event.from_start else ""
    return EventProgram(
        f"{_comment(event)}{since}", event.phase, event.when.source, f"{formula.name}_{event.phase.replace(' ', '_')}",
        recorder.finish(result), tuple(_names(recorder, site, written) for site in sites), move,
        across=across, number=number, forgets=forgets, redraws=redraws, writes=writes,
    )  # fmt: skip


def _redraw(formula: MethodFormula, name: str, seed: int) -> Redraw:
    (tensor,) = (tensor for tensor in formula.tensors if tensor.name == name)
    numbers = tuple(float(value_of(argument)) for argument in tensor.start.arguments)
    return Redraw(tensor.start.name, numbers, len(tensor.shape), seed)


def _narrow(change: ChangeFormula, site: Site) -> Moved | None:
    """What is added to W as narrow products, if W is stored as a matrix or as a stack of them."""
    if change.operator != "+=" or is_scalar(change.value) or site.module_class in ("Conv2d", "Norm"):
        return None
    return moved(change.value)


def _factors(found: Moved, recorder: Recorder, evaluator: Evaluator) -> tuple[Any, ...]:
    """The factors: as they are stored where all of them are tensors, else in the dtype of weight algebra."""
    sides = found.factors
    names = [_stored_name(side) for side in sides]
    if all(names):
        return tuple(recorder[name] for name in names)
    return tuple(map(evaluator, sides))


def _stored_name(node: Expression) -> str:
    """The name of a tensor of the method, or of its copy from before the step; "" for what is computed."""
    if node.operation == "previous":
        inner = _stored_name(node.arguments[0])
        return f"{inner}{BEFORE}" if inner else ""
    return node.name if node.operation == "tensor" else ""


def _move(
    stored: fx.Proxy, start: fx.Proxy | None, site: Site, change: ChangeFormula, shape: Shape, evaluator: Evaluator
) -> None:
    """W in place, as it is stored: changed, or from what it was at the start of the run."""
    value = change.value
    if site.module_class in ("Conv2d", "Norm"):  # no view of what is stored is W
        zeros = Expression("filled", (), shape, value=Quantity.of(0))
        whole = value if value.shape == shape else Expression("add", (zeros, value), shape)
        new = stored_like(evaluator(whole), site)
    else:
        new = evaluator.lifted(value, 2)
        stored, start = (cast(Any, one if one is None else logical(cast(Any, one), site)) for one in (stored, start))
    _write(stored, change.operator, new) if start is None else stored.copy_(start + new)


def _write(target: Any, operator: str, value: Any) -> None:
    """A tensor in place; a number broadcasts."""
    getattr(target, OPERATORS[operator])(value)


def _dtypes(site: Site) -> dict[str, torch.dtype]:
    known = {tensor.name: getattr(torch, tensor.dtype) for tensor in site.tensors}
    return {f"{name}{suffix}": dtype for name, dtype in known.items() for suffix in ("", BEFORE, GRADIENT)}


def _names(recorder: Recorder, site: Site, written: Sequence[str] = ()) -> dict[str, str]:
    """The names of what a program reads, and of what else it writes."""
    keys = {tensor.name: tensor.key for tensor in site.tensors} | {"W": site.parameter} | site.earlier
    beside = {f"{name}{suffix}": f"{key}{mark}" for name, key in keys.items() for suffix, mark in BESIDE.items()}
    known = beside | keys
    return {name: known[name] for name in written} | {
        str(proxy.node.target): known[name] for name, proxy in recorder.inputs.items() if name not in CLOCK
    }
