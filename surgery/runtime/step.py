"""The training step: it owns the tensors, checks the batch, and runs the emitted source of step.py."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from surgery.compiler import p9_emit
from surgery.compiler.diagnostics import did_you_mean, fail
from surgery.compiler.emit.blocks import of_block
from surgery.compiler.event_program import START, EventProgram
from surgery.compiler.events import programs as events_of
from surgery.compiler.graph import Graph, build_module, called_modules, copy_module, non_persistent, tensors
from surgery.compiler.pass_log import logged
from surgery.compiler.plan import Plan, Site
from surgery.runtime import batches, distributed
from surgery.runtime.correct import corrected, corrected_sites
from surgery.runtime.devices import device_of
from surgery.runtime.executed import executed
from surgery.runtime.ownership import beside, own, written_names
from surgery.runtime.replay import replayed
from surgery.runtime.sharded import fill

_NUMBERS = itertools.count(1)
# After so many steps in a row whose float16 gradients overflow, however small the loss scale, training is broken.
_MOST_SKIPPED = 50
_GRADIENTS = re.compile(r"gradients(_in_block_\d+)?")


@dataclass(frozen=True)
class StepResult:
    """What one step gives: `loss` without penalties and `penalty`, both 0-d; `taken` is False for a skipped step.

    `gradient_norm` is that of all gradients together before they are clipped, where the spec clips them.
    """

    loss: Tensor
    penalty: Tensor
    taken: bool = True
    gradient_norm: Tensor | None = None


@dataclass(frozen=True)
class Evaluation:
    """A batch in evaluation mode: the loss's sum and the number of labels, 0-d both, and what the loss was read off.

    `output` is None where the loss is the module's own, or makes no more than some rows of the logits at a time.
    """

    loss: Tensor
    count: Tensor
    output: Tensor | None


class Outputs(dict[str, Any]):
    """Outputs by name, as items and as attributes: `outputs.logits`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class TrainingStep:
    """One optimizer step of an adapted model, as a callable; `source` is the Python text that it executes.

    `weights` holds every tensor of the graph by its full name. What a step may write is the step's own; everything else
    shares the memory of `model`, which is never changed. Making a step seeds torch's generators with the spec's seed.
    A step whose loss is not finite leaves everything as it was on the CPU; on a GPU, where nobody waits for the loss
    inside a step, the caller has to look at `result.loss` before it saves anything.
    """

    scope = "graph"  # what is adapted: the captured model, or its modules in place

    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        model: nn.Module,
        *,
        folder: Path = Path(),
        device: str | torch.device | None = None,
        source: str | None = None,
        events: Sequence[EventProgram] | None = None,
    ) -> None:
        self._plan_run(plan)
        self.model, self.folder = model, folder
        self.graph = graph
        given = tensors(graph.module)
        self.device = _device(device, given)
        programs = events_of(plan) if events is None else tuple(events)
        self._reads_steps = any(program.reads_steps for program in programs)
        self._loss = p9_emit.chosen_loss(plan, graph)
        self._trained = p9_emit.trained_names(plan, graph)
        self._written = written_names(plan, graph, self._trained, programs)
        self._corrected = corrected_sites(plan)
        moved = [*self._written, *(site.parameter for site in self._corrected)]
        self.weights = own(given, moved, set(self._trained), self.device)
        self._correct({site.parameter: site for site in self._corrected})
        self.module = _module(graph, self.weights, self.device)
        self.weights |= beside(programs, self.weights, given, {site.parameter for site in self._corrected})
        self.use_source(logged(p9_emit, plan, graph, programs) if source is None else source)
        self._ready_for_steps()

    def _plan_run(self, plan: Plan) -> None:
        """What a plan says of the steps, none of which is taken yet."""
        self.plan, self.step, self.block = plan, 0, 0
        self.lengths = tuple(step.steps or 0 for step in plan.step_blocks)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run; 0 where nobody has said it."""
        return sum(self.lengths) if all(self.lengths) else 0

    @steps.setter
    def steps(self, steps: int) -> None:
        if len(self.lengths) > 1:
            message = f"the run has {len(self.lengths)} `step` blocks, and this does not say where they end"
            raise fail("SURG044", message, help="set `step.lengths`, the steps of each of them")
        self.lengths = (steps,)

    def _ready_for_steps(self) -> None:
        """What a new step begins with beside its tensors and its text."""
        torch.manual_seed(self.plan.step.seed)
        scaled = self.plan.step.precision == "float16"
        self._scaler = torch.amp.GradScaler(self.device.type) if scaled else None
        self._skipped = 0
        distributed.alike(dict.fromkeys(self.state_dict()["weights"].values()))

    @torch.no_grad()
    def _correct(self, names: Mapping[str, Site]) -> None:
        """Do what happens to W at the start, by name: from the model's own weight and the start's factors."""
        given = tensors(self.graph.module)
        for name, site in names.items():
            stored = given[site.parameter].to(self.device)
            self.weights[name].copy_(corrected(self.plan, site, stored, self.weights))

    def use_source(self, source: str) -> None:
        """Run this text of step.py from now on, with a new optimizer; the weights stay as they are."""
        self.source = source
        self._namespace = _execute(source, self.plan)
        compiled = self.plan.step.compile
        if compiled in ("on", "reduce_overhead") or (compiled == "auto" and self.device.type == "cuda"):
            self._namespace["compile_forward"]()
        self._gradients = {name: run for name, run in self._namespace.items() if _GRADIENTS.fullmatch(name)}
        self._begin(self.block)

    def _begin(self, block: int) -> None:
        """Go on with a `step` block, counted from 0: with its optimizer, which lets what it trains have gradients."""
        self.block = block
        make, self._schedule, self._take = of_block(self._namespace, block)
        self.optimizer: torch.optim.Optimizer = make(self.weights)
        if self.plan.step.compile == "reduce_overhead":  # a recording is of the gradients of one block
            self._namespace |= {name: replayed(run, self.device) for name, run in self._gradients.items()}
        if distributed.processes() > 1:
            self.optimizer.register_step_pre_hook(self._seed_optimizer)  # replicas round alike

    # --- training ---

    def __call__(self, batch: Mapping[str, Tensor]) -> StepResult:
        """Take one optimizer step on a batch: the graph's inputs and `labels`, each [rows, ...].

        The last step of a `step` block ends with the next one's optimizer. Raises SurgError: SURG043 or SURG044 for a
        batch that does not fit (nothing is changed), SURG053 if float16 gradients overflow at every loss scale.
        """
        several = len(self.lengths) > 1
        if not self.steps:
            self._check_steps(several)
        ready = self._ready(batch, labels=True)
        scaler = () if self._scaler is None else (self._scaler,)
        first = sum(self.lengths[: self.block])
        where = (first, self.lengths[self.block]) if several else ()
        distributed.seed_step(self.plan.step.seed, self.step, own=True)
        loss, norm, taken, *added = self._take(
            self.weights, self.optimizer, ready, self.step, self.steps, *where, *scaler
        )
        if taken:
            self.step += 1
            if several and self.step == sum(self.lengths[: self.block + 1]) < self.steps:
                self._begin(self.block + 1)
        self._skipped = 0 if taken else self._skipped + 1
        if self._scaler is not None and self._skipped > _MOST_SKIPPED:
            message = f"the float16 gradients of step {self.step} overflow at every loss scale"
            raise fail("SURG053", message, help="lower lr, or use `precision = bfloat16`")
        return StepResult(loss, added[0] if added else torch.zeros((), device=loss.device), taken, norm)

    def _check_steps(self, several: bool) -> None:
        """Nothing may read a number of steps that is not known."""
        schedule = self.plan.step.schedule
        what = "the end of a block" if several else "an event or a penalty" if self._reads_steps else ""
        if not several and (schedule.name != "constant" or schedule.warmup):
            what = f"the {schedule.name} schedule"
        if what:
            where = "each step block, or set `step.lengths`" if several else "the step block, or set `step.steps`"
            raise fail("SURG044", f"{what} needs the number of steps", help=f"write `steps = ...` in {where}")

    def _seed_optimizer(self, *_: Any) -> None:
        distributed.seed_step(self.plan.step.seed, self.step, own=False)

    @property
    def learning_rate(self) -> float:
        """The scheduled rate of the next step (of the optimizer's own `lr`; tensors may have theirs)."""
        first, count = sum(self.lengths[: self.block]), self.lengths[self.block]
        factor: float = self._schedule(self.step - first, count)
        return self.plan.step_blocks[self.block].optimizer.lr * factor

    def label_count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How many labels the loss of a batch is a mean over, 0-d int64."""
        ready = self._ready(batch, labels=True)
        count: Tensor = self._loss.count(ready[self._loss.labels])
        return count

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Tensor]) -> Evaluation:
        """The loss of a batch in evaluation mode, and the outputs that it comes from."""
        ready = self._ready(batch, labels=True)
        labels = ready[self._loss.labels]
        count = self._loss.count(labels)
        # Such a loss takes the last hidden states, and makes logits of some rows at a time.
        if "head" in self._namespace and labels.ndim > 1:
            loss = self._namespace[self._loss.loss.total.__name__]
            options = {"training": False} if "training" in inspect.signature(loss).parameters else {}
            with self._precision():
                hidden = self._run(ready, "hidden_states")
                return Evaluation(
                    loss(self.weights, hidden, labels, torch.ones_like(count), **options), count, output=None
                )
        output = self._run(ready)
        if self._loss.output is not None:
            output = output[self._loss.output]
        return Evaluation(self._loss.total(output, labels), count, None if output.ndim == 0 else output)

    def evaluate_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss's sum over a batch in evaluation mode, and the number of labels."""
        found = self.evaluate(batch)
        return found.loss, found.count

    @torch.no_grad()
    def forward(self, **inputs: Tensor) -> Any:
        """The outputs in evaluation mode: `.logits`, `.last_hidden_state`, or the module's own structure."""
        output = self._run(self._ready(inputs, labels=False))
        if self.graph.output == "logits":
            name = "last_hidden_state" if self.plan.model.task == "feature_extraction" else "logits"
            return Outputs({name: output})
        spec = self.graph.output_spec
        return output if spec is None else pytree.tree_unflatten(list(output), spec)

    def _run(self, ready: Mapping[str, Tensor], function: str = "forward") -> Any:
        arguments = [ready[name] for name in self.graph.inputs]
        with self._precision():
            return self._namespace[function](self.weights, *arguments, training=False)

    def _precision(self) -> AbstractContextManager[Any]:
        """The step's autocast."""
        precision = self.plan.step.precision
        return nullcontext() if precision == "model" else torch.autocast(self.device.type, getattr(torch, precision))

    def _ready(self, batch: Mapping[str, Tensor], *, labels: bool) -> dict[str, Tensor]:
        needed = self._loss.labels if labels else None
        checked = batches.check(batch, self.graph.inputs, needed, causal=self.plan.model.task == "causal_lm")
        return {name: _moved(value, self.device) for name, value in checked.items()}

    # --- what is inside ---

    @property
    def parameters_by_site(self) -> dict[str, dict[str, Tensor]]:
        """The method's tensors by site and name, frozen and state too: the step's own objects."""
        return {
            site.path: {tensor.name: self.weights[tensor.key] for tensor in site.tensors} for site in self.plan.sites
        }

    @property
    def graph_source(self) -> str:
        """The text of graph.py: the adapted model's forward alone."""
        return p9_emit.graph_source(self.plan, self.graph)

    def effective_weight(self, path: str) -> Tensor:
        """What the site multiplies with now, [out, in], in float32, or in W's dtype where that is wider.

        Raises SurgError: SURG020 if `path` is no site, SURG055 if its output is not affine in the input.
        """
        from surgery.compiler.algebra.instance import effective_weight

        return effective_weight(self.plan, self._site(path), self.weights)

    def effective_bias(self, path: str) -> Tensor | None:
        """What the site adds now, [out], or None; raises as `effective_weight` does."""
        from surgery.compiler.algebra.instance import effective_bias

        return effective_bias(self.plan, self._site(path), self.weights)

    def _site(self, path: str) -> Site:
        for site in self.plan.sites:
            if site.path == path:
                return site
        help = did_you_mean(path, [site.path for site in self.plan.sites])
        raise fail("SURG020", f"`{path}` is no adapted site", help=help)

    def merge(self) -> nn.Module:
        """A copy of the user's model with the merged weights; raises SURG055 with the reasons if there is none."""
        from surgery.runtime.merge import merged

        return merged(self)

    # --- saving ---

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on to the bit; tensors are the live ones, not copies."""
        keys = dict.fromkeys([*self._written, *(tensor.key for site in self.plan.sites for tensor in site.tensors)])
        return {
            "weights": {key: self.weights[key].detach() for key in keys},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "block": self.block,
            "random": _random_state(self.device),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a saved state in place; raises SURG054 if it is of another program."""
        lacking = [name for name in ("weights", "optimizer", "step") if name not in state]
        if lacking:
            message = f"this is no state of a training step: it lacks {', '.join(lacking)}"
            raise fail("SURG054", message, help="pass what `step.state_dict()` gave")
        saved: Mapping[str, Tensor] = state["weights"]
        for key in self.state_dict()["weights"]:
            if key not in saved or saved[key].shape != self.weights[key].shape:
                found = "is missing" if key not in saved else f"has shape {list(saved[key].shape)}"
                message = f"`{key}` of shape {list(self.weights[key].shape)} {found} in the state"
                raise fail("SURG054", message, help="the state is of another spec or another model")
        for key in self.state_dict()["weights"]:
            fill(self.weights[key], saved[key])
        for site in self._corrected:  # a W that events move is in the state, what it moves from is not
            start = f"{site.parameter}{START}"
            name = start if start in self.weights else site.parameter
            if name not in self._written:
                self._correct({name: site})
        if (block := int(state.get("block", 0))) != self.block:
            self._begin(block)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        if self._scaler is not None and state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])
        _set_random_state(state.get("random") or {}, self.device)

    def save(self, directory: str | Path) -> None:
        """Write a run folder; an existing one is replaced as a whole."""
        from surgery.runtime.run_folder import save_step

        save_step(self, directory)


def _device(device: str | torch.device | None, given: Mapping[str, Tensor]) -> torch.device:
    if device is not None:
        return device_of(device)
    return next((tensor.device for tensor in given.values()), torch.device("cpu"))


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; to a GPU from pinned memory, since the host would wait for any other to be read."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def _module(graph: Graph, weights: dict[str, Tensor], device: torch.device) -> fx.GraphModule:
    """The graph over the step's own tensors, making its constants on the step's device."""
    module = copy_module(graph.module)
    for node in module.graph.nodes:
        node.args = pytree.tree_map_only(torch.device, lambda _: device, node.args)
        node.kwargs = pytree.tree_map_only(torch.device, lambda _: device, node.kwargs)
    transient, name = non_persistent(graph.module), type(graph.module).__name__
    return build_module(module.graph, weights, transient, name, called_modules(module))


def _execute(source: str, plan: Plan) -> dict[str, Any]:
    """Run the text of step.py as a module of its own, whose lines tracebacks and debuggers can show."""
    return executed(source, "surgery_step", f"<step.py of {Path(plan.file).name}, number {next(_NUMBERS)}>")


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
