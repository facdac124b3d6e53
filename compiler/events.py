"""Events as programs of the step: each statement a small graph over one site's tensors, with its condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn

from surgery.compiler.algebra.base import logical, stacked, stored_like
from surgery.compiler.algebra.condition import ALWAYS, Condition
from surgery.compiler.algebra.evaluate import Evaluator, wider
from surgery.compiler.algebra.expression import BEFORE, Expression, Shape
from surgery.compiler.algebra.facts import is_scalar
from surgery.compiler.algebra.formula import AT_START, ChangeFormula, EventFormula, MethodFormula
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.method import KEPT as AT_START_SUFFIX
from surgery.compiler.algebra.moved import Moved, moved
from surgery.compiler.algebra.quantity import CLOCK, Quantity, value_of
from surgery.compiler.algebra.recorder import Recorder
from surgery.compiler.algebra.telescope import snapshot_names, summed, switch_name
from surgery.compiler.plan import Plan, Site
from surgery.compiler.span import Span

KEPT, START = ".before", ".start"  # behind the name of a tensor: what it was when the step, or the run, began
BESIDE = {BEFORE: KEPT, AT_START_SUFFIX: START}  # by the end of the name of a placeholder


@dataclass(frozen=True)
class Move:
    """W at all sites by narrow products: `W = start + scale * (product - product before)`, in one operation.

    The program's graph gives the factors: left, right, and those before if there are any. `source` is the placeholder
    of what W starts from, "W" itself for a change of it.
    """

    scale: float
    source: str
    transposed: bool  # W is stored as [in, out]


@dataclass(frozen=True)
class EventProgram:
    """One statement of an event, for all sites of one size.

    `graph` has a placeholder per tensor it reads or writes and works in place; `sites` names, per site, the weight
    behind each placeholder: "first.A" behind "A", "first.A.before" behind "A_before", its value at the start of the
    step. With `move` it writes W, whose name is among them too.
    """

    comment: str
    phase: str  # "start" (before everything else in the step), "penalty" or "after step"
    condition: str  # Python over the whole numbers `step` and `steps`
    function: str
    graph: fx.Graph = field(compare=False)
    sites: tuple[dict[str, str], ...] = ()
    move: Move | None = None

    @property
    def kept(self) -> list[str]:
        """Names of what is copied at the start of a step whose condition holds."""
        names = [name for site in self.sites for name in site.values() if name.endswith(KEPT)]
        return [name.removesuffix(KEPT) for name in dict.fromkeys(names)]


def programs(plan: Plan) -> tuple[EventProgram, ...]:
    """The plan's events in the order in which the step runs them."""
    found: list[EventProgram] = []
    for key in plan.formulas:
        sites = [site for site in plan.sites if site.formula == key]
        if not sites:
            continue
        formula = instance(plan, key)
        if plan.formulas[key].telescope or plan.formulas[key].from_start:
            found.append(_snapshot(_original(plan, key), sites, plan.formulas[key].telescope))
        for event in formula.events:
            if event.phase == AT_START:  # done when the step is made
                continue
            for number, change in enumerate(event.changes):
                found += [_program(formula, event, change, number, alike) for alike in _stored_alike(sites)]
    return (*found, *_penalties(plan))


def _penalties(plan: Plan) -> list[EventProgram]:
    """What the methods add to the loss of a step, site by site; what reads nothing of a site's own counts once."""
    found: list[EventProgram] = []
    known: set[tuple[object, ...]] = set()
    for key in plan.formulas:
        formula = instance(plan, key)
        sites = [site for site in plan.sites if site.formula == key]
        for alike in _stored_alike(sites) if formula.penalty is not None else ():
            recorder, evaluator = _evaluator(alike[0])
            value = evaluator(formula.penalty)
            graph = recorder.finish((value,))
            own = []
            for site in alike:
                names = _names(recorder, site)
                same = (str(fx.GraphModule(nn.Module(), graph).code), *names.items())
                own += [] if same in known else [names]
                known.add(same)
            if own:
                said = f"{_place(formula.penalty.span)}penalty of {formula.name}"
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
    formula: MethodFormula, event: EventFormula, change: ChangeFormula, number: int, sites: list[Site]
) -> EventProgram:
    recorder, evaluator = _evaluator(sites[0])
    move = result = None
    if change.target != "W":
        _write(recorder[change.target], change.operator, evaluator(change.value))
    elif found := _narrow(change, sites[0]):
        move = Move(found.scale, f"W{AT_START_SUFFIX}" if event.from_start else "W", sites[0].transposed)
        result = _factors(found, recorder, evaluator)
    else:
        start = recorder[f"W{AT_START_SUFFIX}"] if event.from_start else None
        _move(recorder["W"], start, sites[0], change, formula.shape, evaluator)
    suffix = f"_{number + 1}" if len(event.changes) > 1 else ""
    written = () if move is None else ("W", move.source)
    since = f", summed since its start: W from `W{START}`, rounded once" if event.from_start else ""
    return EventProgram(
        f"{_comment(event)}{since}", "after step", event.when.source, f"{formula.name}_after_step{suffix}",
        recorder.finish(result), tuple(_names(recorder, site, written) for site in sites), move,
    )  # fmt: skip


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
    """A tensor in place."""
    getattr(target, {"=": "copy_", "+=": "add_", "*=": "mul_"}[operator])(value)


def _dtypes(site: Site) -> dict[str, torch.dtype]:
    known = {tensor.name: getattr(torch, tensor.dtype) for tensor in site.tensors}
    return known | {f"{name}{BEFORE}": dtype for name, dtype in known.items()}


def _names(recorder: Recorder, site: Site, written: Sequence[str] = ()) -> dict[str, str]:
    """The names of what a program reads, and of what else it writes."""
    keys = {tensor.name: tensor.key for tensor in site.tensors} | {"W": site.parameter} | site.earlier
    beside = {f"{name}{suffix}": f"{key}{mark}" for name, key in keys.items() for suffix, mark in BESIDE.items()}
    known = beside | keys
    return {name: known[name] for name in written} | {
        str(proxy.node.target): known[name] for name, proxy in recorder.inputs.items() if name not in CLOCK
    }
