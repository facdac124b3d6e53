"""The training step in module scope: the adapted model is the forward, one process's or spread over several (FSDP2).

Loss, optimizer, schedule and events are the text of step.py, as in graph scope. Over several processes the weights of
the model are spread by rows, also those that events move; what is trained is whole on each process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from surgery.compiler import p9_emit, pipeline
from surgery.compiler.built_again import built_again
from surgery.compiler.diagnostics import Diagnostic, fail, render
from surgery.compiler.emit.whole_model import whole_model
from surgery.compiler.event_program import KEPT, START, EventProgram
from surgery.compiler.events import programs
from surgery.compiler.examples import example_inputs
from surgery.compiler.graph import Graph, build_module
from surgery.compiler.pass_log import logged
from surgery.compiler.plan import Plan
from surgery.compiler.program import Program
from surgery.runtime import distributed
from surgery.runtime.attach import Adapted
from surgery.runtime.calibrate import missing
from surgery.runtime.clock import stored
from surgery.runtime.distributed_checks import check_spread
from surgery.runtime.initialise import Sources
from surgery.runtime.mapped import mapped_model
from surgery.runtime.measure import Batches, measurements
from surgery.runtime.models import load_model
from surgery.runtime.modules import adapt
from surgery.runtime.owners import AdaptedOwner
from surgery.runtime.ownership import written_names
from surgery.runtime.run_folder import RunState
from surgery.runtime.sharded import shard
from surgery.runtime.step import TrainingStep


class ModuleStep(TrainingStep):
    """One optimizer step of a model that `surgery.apply` adapts; `weights` holds what it trains and events read.

    All processes of a run make it together and take its steps together.
    """

    scope = "module"

    def __init__(self, plan: Plan, model: nn.Module, sources: Sources, device: torch.device, folder: Path) -> None:
        self._plan_run(plan)
        self.model, self.folder, self.device = model, folder, device
        events = programs(plan)
        names = adapt(plan, model, sources)
        names |= {whole.name: whole.name for whole in plan.trained}
        whole = [parameter for name in names.values() if isinstance(parameter := stored(model, name), nn.Parameter)]
        for path in plan.recomputed:
            _run_again(model.get_submodule(path))
        if distributed.processes() > 1:
            for module in _modules_of(model, {id(stored(model, site.parameter)) for site in built_again(plan)}):
                _run_again(module)
            for parameter in whole:  # it may be a mapped file, which nothing writes to
                parameter.data = parameter.data.clone()
            shard(model, set(whole), device)
        moved = {site.parameter for site in plan.sites for event in events if site.parameter in _names(event)}
        self.weights = {key: stored(model, name) for key, name in names.items()}
        self.weights |= {name: stored(model, name) for name in moved}
        for parameter in set(whole):
            parameter.requires_grad_(True)
        self.graph = _inputs_alone(self.weights, tuple(_inputs(plan, model)))
        for name in {name for event in events for name in _names(event)}:
            if name.endswith(KEPT):
                self.weights[name] = torch.empty_like(self.weights[name.removesuffix(KEPT)], requires_grad=False)
            elif name.endswith(START):
                self.weights[name] = self.weights[name.removesuffix(START)].detach().clone()
        self._reads_steps = any(event.reads_steps for event in events)
        self._loss = p9_emit.chosen_loss(plan, self.graph)
        self._trained = p9_emit.trained_names(plan, self.graph)
        self._written = written_names(plan, self.graph, self._trained, events)
        self._corrected = []  # the modules were adapted so
        self.use_source(logged(p9_emit, plan, self.graph, events, whole_model(self.graph.inputs, plan.model.task)))
        self._ready_for_steps()

    def use_source(self, source: str) -> None:
        """Run this text of step.py from now on, with a new optimizer; the weights stay as they are."""
        super().use_source(source)
        self._namespace["MODEL"] = self.model


def module_step(
    program: Program, device: str | None = None, *, state: RunState | None = None, calibration: Batches | None = None,
    allow_code: bool = False,
) -> ModuleStep:  # fmt: skip
    """The step of a program in module scope, on `device` (default: a GPU if there is one), or that of a run's state.

    `calibration` batches are for numbers of the data, which a run has. Over several processes each reads its own rows
    of the checkpoint, but for these numbers all of it. Raises SURG036 for starts that read data, SURG060
    where modules cannot be replaced, SURG072 for what cannot be spread.
    """
    from surgery.api import plan as planned

    place = torch.device(device or distributed.local_device())
    made = planned(program, allow_code=allow_code, numbers=state.plan.measured if state else "draft")
    check_spread(made, "module").raise_errors()
    if state is None and any(site.facts.needs_calibration for site in made.sites):
        raise missing(made)
    if not made.totals.trainable:
        raise fail("SURG020", "the program trains nothing", made.span(made.sites[0].place))
    model = None
    if distributed.processes() > 1:
        model = mapped_model(made.model, program.folder)
        if model is None:
            message = f'each of the {distributed.processes()} processes reads the whole model "{made.model.name}"'
            warnings.warn(render(Diagnostic("SURG073", message, severity="warning")), stacklevel=2)
    if model is None:
        first = "cpu" if distributed.processes() > 1 else place  # rows of it go on from there
        model = load_model(made.model, program.folder, first, seed=made.step.seed, allow_code=allow_code)
    measured = state.plan.measured if state else measurements(program, model, calibration)
    plan = pipeline.resolve(program, model, measured=measured)
    saved = state.state["weights"] if state else None
    return ModuleStep(plan, model, Sources(program.folder, saved=saved), place, program.folder)


def _inputs(plan: Plan, model: nn.Module) -> list[str]:
    return list(example_inputs(model, plan.model.task, plan.data is not None and plan.data.pack))


def _inputs_alone(weights: Mapping[str, Tensor], inputs: tuple[str, ...]) -> Graph:
    """A graph that holds tensors and computes nothing: what the emitter asks of one in module scope."""
    graph = fx.Graph()
    (first, *_) = [graph.placeholder(name) for name in inputs]
    graph.output(first)
    return Graph(build_module(graph, dict(weights), set()), inputs, "logits")


def _names(event: EventProgram) -> set[str]:
    return {name for site in event.sites for name in site.values()}


def _modules_of(model: nn.Module, weights: set[int]) -> list[nn.Module]:
    """The adapted modules of some weights, tied ones too."""
    adapted = [module for module in model.modules() if isinstance(module, Adapted | AdaptedOwner)]
    return [module for module in adapted if not weights.isdisjoint(map(id, module.parameters(recurse=False)))]


def _run_again(block: nn.Module) -> None:
    """Let the backward run a module's forward again: nothing inside it is kept."""
    own: Callable[..., Any] = block.forward

    def forward(*given: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return own(*given, **named)
        return checkpoint(own, *given, use_reentrant=False, **named)

    block.forward = forward
