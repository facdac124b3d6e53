"""What cannot be run in a scope, or over several processes: said before a step is taken, at the line of the spec."""

from __future__ import annotations

from torch import nn

from surgery.compiler import nodes, p1_parse
from surgery.compiler.diagnostics import Diagnostics
from surgery.compiler.event_program import EventProgram
from surgery.compiler.events import programs
from surgery.compiler.plan import Plan, StepPlan
from surgery.compiler.span import Source, Span
from surgery.optimizers import OPTIMIZERS
from surgery.runtime.distributed import processes
from surgery.runtime.modules import reads_across


def check_spread(plan: Plan, scope: str, count: int | None = None) -> Diagnostics:
    """What of a plan does not go with its scope, and with `count` processes (default: those that there are)."""
    count = processes() if count is None else count
    found, several, step = Diagnostics(), count > 1, plan.step
    for block in plan.step_blocks if several else ():
        _check_rows(plan, block, count, found)
    if several and step.compile == "reduce_overhead":
        message = "one CUDA graph cannot hold the sums over processes"
        found.error("SURG072", message, _setting(plan, nodes.Step, "compile"), help="write `compile = on`")
    elif scope == "module" and step.compile in ("on", "reduce_overhead"):
        message = "a model in module scope runs as it is, and is not compiled"
        help = "leave `compile` out, or train in graph scope"
        found.error("SURG072", message, _setting(plan, nodes.Step, "compile"), help=help)
    if scope == "module" and plan.model.quantize is not None:
        message = "a quantized model is trained in graph scope"
        help = "leave `--scope module` out: a quantized model is small enough for each process"
        found.error("SURG072", message, _setting(plan, nodes.Model, "quantize"), help=help)
    if scope == "module":
        found.found += reads_across(plan).found
    if scope == "module" and several:
        for event in programs(plan):
            _check_event(plan, event, found)
    return found


def _check_rows(plan: Plan, step: StepPlan, count: int, found: Diagnostics) -> None:
    """Each process has rows of each batch, and no other ones."""
    if step.batch < count:
        message = f"`batch = {step.batch}` for {count} processes: some would have no row to work on"
        help = f"write `batch = {count}` or more, or start fewer processes"
        found.error("SURG072", message, _setting(plan, nodes.Step, "batch", step.number), help=help)
    if OPTIMIZERS[step.optimizer.name].needs == "jacobian":
        message = f"`{step.optimizer.name}` reads the outputs of all rows, and no process has them"
        where = _setting(plan, nodes.Step, "optimizer", step.number)
        found.error("SURG072", message, where, help="train it with one process")


def check_model(plan: Plan, model: nn.Module) -> Diagnostics:
    """What of a model does not go with several processes."""
    found = Diagnostics()
    kept = [path for path, module in model.named_modules() if getattr(module, "running_mean", None) is not None]
    if kept and processes() > 1:
        message = f"`{kept[0]}` keeps running statistics of its batches, and no process sees a whole batch"
        place = next((item.span for item in _items(plan) if isinstance(item, nodes.Model)), None)
        found.error("SURG072", message, place, help="train it with one process")
    return found


def _check_event(plan: Plan, event: EventProgram, found: Diagnostics) -> None:
    """Of a W that is spread each process moves its rows, by factors that are whole on it."""
    for site in plan.sites:
        names = next((names for names in event.sites if site.parameter in names.values()), None)
        if names is None:
            continue
        read = {str(node.target) for node in event.graph.nodes if node.op == "placeholder"}
        if event.move is None or any(names[name] == site.parameter for name in read):
            places = [one.place for one in plan.events if one.formula == site.formula and one.phase != "at start"]
            message = f"`{site.path}` is spread over processes by rows, and this event needs its W whole"
            help = "train in graph scope, where each process has it"
            found.error("SURG072", message, plan.span(places[0] if places else site.place), help=help)
            return


def _setting(plan: Plan, block: type[nodes.Node], name: str, number: int = 0) -> Span | None:
    """Where a spec says a setting, in the block of that number or one before it; the block if all leave it out."""
    items = [item for item in _items(plan) if isinstance(item, block)][: number + 1]
    lines = [line for item in reversed(items) for line in getattr(item, "settings", ())]
    named = (line.span for line in lines if isinstance(line, nodes.Setting) and line.name == name)
    return next(named, items[-1].span if items else None)


def _items(plan: Plan) -> tuple[nodes.Node, ...]:
    return tuple(p1_parse.run(Source(plan.file, plan.spec)).items)
