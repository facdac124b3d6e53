"""Module scope: single modules replaced by adapted ones; the model keeps its class, `generate` and `Trainer`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from surgery.compiler import pipeline
from surgery.compiler.algebra.instance import instance
from surgery.compiler.diagnostics import Diagnostics, fail
from surgery.compiler.events import programs
from surgery.compiler.factors import setting
from surgery.compiler.graph import tensors
from surgery.compiler.plan import Plan, Site
from surgery.compiler.program import Program
from surgery.optimizers import OPTIMIZERS
from surgery.runtime import clock
from surgery.runtime.attach import SHARED, Adapted, attach, own_weights
from surgery.runtime.initialise import Sources, initialise
from surgery.runtime.owners import AdaptedOwner
from surgery.runtime.quantize import quantizing
from surgery.runtime.run_folder import load_state


def apply_program(program: Program, model: nn.Module) -> nn.Module:
    """Adapt a model in place; see `surgery.apply`."""
    _refuse_adapted(model)
    plan = pipeline.resolve(program, model)
    reads_across(plan).raise_errors()
    if plan.later:
        message = "a trainer has one optimizer and one schedule, so it would run the first `step` block alone"
        second = program.moving[1].node
        help_text = "use surgery.compile or `surgery train`"
        raise fail("SURG060", message, second.span if second else None, help=help_text)
    if OPTIMIZERS[plan.step.optimizer.name].needs is not None:
        message = f"the optimizer is the trainer's here, and the spec's {plan.step.optimizer.name} would not run"
        help_text = "use surgery.compile, or name adamw or sgd in the spec"
        raise fail("SURG060", message, setting(program, "optimizer"), help=help_text)
    early = next((event for event in plan.events if event.phase == "after backward"), None)
    if early is not None:
        message = "a trainer gives no notice between the backward and the clipping, so this event would not run"
        help_text = "write `after step`, whose gradients are clipped, or use surgery.compile"
        raise fail("SURG060", message, plan.span(early.place), help=help_text)
    if plan.active:
        message = "a trainer gives no notice between the backward and the clipping, so all weights would learn"
        raise fail("SURG060", message, plan.span(plan.active[0].place), help="use surgery.compile or `surgery train`")
    with quantizing(model, plan):
        attached = attach(plan, model, initialise(plan, tensors(model), Sources(program.folder)))
    if events := programs(plan):
        clock.attach(clock.Clock(events, _full_names(plan), attached), attached, _owners(plan, attached))
    return attached


def apply_run(directory: Path, model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Attach a trained run to a model in place; a base weight that the run moved is moved here too.

    A model that the run quantized is quantized on `device`, and goes there.
    """
    _refuse_adapted(model)
    state = load_state(directory)
    from surgery.api import parse

    plan = pipeline.resolve(parse(state.spec, state.folder, state.plan.file), model, saved=state.plan)
    if plan.model.fingerprint != state.plan.model.fingerprint:
        raise fail("SURG054", f"`{directory}` is a run of another model than the one given")
    reads_across(plan).raise_errors()
    saved = {name: value for name, value in state.state["weights"].items() if isinstance(value, Tensor)}
    wanted = {tensor.key for site in plan.sites for tensor in site.tensors}
    missing = sorted(wanted - saved.keys())
    if missing:
        raise fail("SURG054", f"`{directory}` lacks `{missing[0]}`")
    with quantizing(model, plan, device):
        named = tensors(model)
        place = next(iter(named.values())).device
        attached = attach(plan, model, {key: saved[key].to(place) for key in wanted})
    named |= {site.parameter: clock.stored(attached, site.parameter) for site in own_weights(plan)}
    with torch.no_grad():
        for name in saved.keys() - wanted:
            named[name].copy_(saved[name])
    if programs(plan):
        clock.attach(None, attached, _owners(plan, attached))
    return attached


def adapt(plan: Plan, model: nn.Module, sources: Sources) -> dict[str, str]:
    """Adapt the modules of a plan in place, for one who runs the events; where its tensors are in the model, by key."""
    _refuse_adapted(model)
    reads_across(plan).raise_errors()
    attach(plan, model, initialise(plan, tensors(model), sources))
    return _full_names(plan)


def is_adapted(model: nn.Module) -> bool:
    """Whether `surgery.apply` has changed a model."""
    return any(isinstance(module, Adapted | AdaptedOwner) for module in model.modules())


def _refuse_adapted(model: nn.Module) -> None:
    """A second program would freeze what the first one trains."""
    if is_adapted(model):
        raise fail("SURG060", "the model is adapted already", help="put all rules into one program")


def _full_names(plan: Plan) -> dict[str, str]:
    """Where the tensors of all sites are in the adapted model, by key."""
    found: dict[str, str] = {}
    for site in plan.sites:
        home = f"{site.path}_adapter" if site.path == site.parameter else _owner(site)
        for tensor in site.tensors:
            own = f"{home}.{tensor.name}"
            found[tensor.key] = f"{SHARED}.{tensor.key.replace('.', '_')}" if tensor.key.startswith("shared.") else own
    return found


def _owner(site: Site) -> str:
    """The path of the module whose forward uses W and the site's tensors; the root's is empty."""
    return site.parameter.rpartition(".")[0] if site.module_class in ("Experts", "Parameter") else site.path


def _owners(plan: Plan, model: nn.Module) -> list[nn.Module]:
    """The modules whose forward uses what events of the plan read or write."""
    formulas = {event.formula for event in plan.events if event.phase != "at start"}
    formulas |= {key for key in plan.formulas if instance(plan, key).penalty is not None}
    return [model.get_submodule(_owner(site)) for site in plan.sites if site.formula in formulas]


def reads_across(plan: Plan) -> Diagnostics:
    """What is wrong with a plan that reads other blocks, trained or not."""
    diagnostics = Diagnostics()
    across = next((site for site in plan.sites if site.earlier or site.earlier_inputs), None)
    if across is not None:
        message = f"`{across.path}` reads another block, and a module in place knows its own weights alone"
        help_text = "use surgery.compile, or `surgery train` in graph scope: they see the whole graph"
        diagnostics.error("SURG060", message, plan.span(across.place), help=help_text)
    return diagnostics
