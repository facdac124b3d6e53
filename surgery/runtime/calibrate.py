"""Calibration data to what starts read of it: gradients of the loss, and sums over the inputs of a site.

The captured graph runs in evaluation mode over tensors that share the model's memory, so the model, its flags and its
config are never touched. A weight's gradient leaves the device as soon as it exists: there is never more than one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from surgery.compiler.algebra.evaluate import wider
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.sources import calibrated, walk
from surgery.compiler.diagnostics import Note, SurgError, fail
from surgery.compiler.graph import Graph, build_module, copy_module, non_persistent, tensors
from surgery.compiler.p9_emit import chosen_loss
from surgery.compiler.plan import Plan, Site
from surgery.compiler.uses import ADDMM, LINEAR, PRODUCT, QUANTIZED
from surgery.runtime import batches as batches_of
from surgery.runtime.data import Data, seeded

KINDS = {"gradient": "grad(W)", "activations": "activations(x)"}  # what starts read of the data, and how it is spelt


@dataclass(frozen=True)
class Calibration:
    """What was seen, by site, on the CPU.

    `gradients`: of the mean loss over all labels, laid out as the weight is stored, in float32 or wider. `grams`: the
    sum of `x.T @ x` over all tokens that are no padding, `[in, in]`, float64.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)


def missing(plan: Plan) -> SurgError:
    """The error for starts that read calibration data where there is none (SURG036)."""
    site = next(site for site in plan.sites if site.facts.needs_calibration)
    starts = [tensor.start.expression for tensor in instance(plan, site.formula).tensors]
    reads = next(part for start in starts if start is not None for part in walk(start) if part.operation in KINDS)
    message = f"`{KINDS[reads.operation]}` needs calibration data, and there is none"
    help_text = (
        "in Python give `surgery.compile(..., calibration=[batch, ...])`; `surgery train` and `surgery compile` "
        "read it from the spec's data block (`calibrate = 128` rows)"
    )
    notes = [Note("asked for by this rule", plan.span(site.place))]
    return fail("SURG036", message, reads.span, notes=notes, help=help_text)


def calibration_batches(plan: Plan, data: Data) -> list[dict[str, Tensor]]:
    """`calibrate` rows of the training data, drawn by the seed, in batches of the step's micro-batch; not packed."""
    assert plan.data is not None  # the data were read by it
    documents = data.train.documents
    rows = min(plan.data.calibrate, len(documents))
    size = plan.step.micro_batch or plan.step.batch
    chosen = torch.randperm(len(documents), generator=seeded(plan.step.seed, -2))[:rows].tolist()
    chosen.sort(key=documents.length)
    return [documents.batch(chosen[start : start + size]) for start in range(0, rows, size)]


def calibrate(plan: Plan, graph: Graph, batches: Sequence[Mapping[str, Tensor]]) -> Calibration:
    """Run the batches through the captured model and give what the starts of the plan's sites read.

    Raises SURG036 for batches without a label or inputs that were not seen, SURG053 for a loss that is not finite, and
    what a training step raises for a batch that does not fit it.
    """
    needs = {site.path: calibrated(instance(plan, site.formula)) for site in plan.sites}
    loss = chosen_loss(plan, graph)
    found = Calibration()
    module, weights = _module(plan, graph, [site for site in plan.sites if "gradient" in needs[site.path]], found)
    watched = {id(weights[site.parameter]): site for site in plan.sites if "activations" in needs[site.path]}
    device = next(iter(weights.values())).device
    causal = plan.model.task == "causal_lm"
    ready = []
    for batch in batches:
        checked = batches_of.check(batch, graph.inputs, loss.labels, causal=causal)
        ready.append(({name: value.to(device) for name, value in checked.items()}, batch.get("attention_mask")))
    labels = sum(int(loss.count(entries[loss.labels])) for entries, _ in ready)
    if labels == 0:
        help_text = "give batches as the training step takes them: its inputs and `labels`"
        raise fail("SURG036", "the calibration batches hold no labels", help=help_text)
    with torch.set_grad_enabled(any("gradient" in kinds for kinds in needs.values())):
        for entries, mask in ready:
            runner = _Runner(module, watched, found.grams, mask)
            output = runner.run(*(entries[name] for name in graph.inputs), False)
            if loss.output is not None:
                output = output[loss.output]
            total = loss.total(output, entries[loss.labels]) / labels
            if not torch.isfinite(total):
                raise fail("SURG053", f"the loss of the calibration data is {float(total.detach())}")
            if total.requires_grad:
                torch.autograd.backward(total)
    for site in plan.sites:
        if "gradient" in needs[site.path] and site.path not in found.gradients:
            message = f"no gradient of the loss reaches the weight of `{site.path}`, so `grad(W)` is not known"
            help_text = "adapt a weight that the loss depends on, or this one with another method"
            raise fail("SURG036", message, plan.span(site.place), help=help_text)
        if "activations" in needs[site.path] and site.path not in found.grams:
            message = f"the inputs of `{site.path}` are not rows that meet a matrix, so `activations(x)` is not known"
            raise fail("SURG036", message, plan.span(site.place), help="adapt linear modules with this method")
    return found


def _module(
    plan: Plan, graph: Graph, differentiated: list[Site], found: Calibration
) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The graph over its own handles of the model's memory; those of `differentiated` give their gradient."""
    named = tensors(graph.module)
    shared: dict[int, Tensor] = {}
    weights = {name: shared.setdefault(id(tensor), tensor.detach()) for name, tensor in named.items()}
    for site in plan.sites:
        if site.untied:  # only this use of the tied weight is adapted
            weights[site.parameter] = named[site.parameter].detach()
    for site in differentiated:
        _take_gradient(weights[site.parameter].requires_grad_(), site.path, found.gradients)
    return build_module(copy_module(graph.module).graph, weights, non_persistent(graph.module)), weights


def _take_gradient(leaf: Tensor, path: str, gradients: dict[str, Tensor]) -> None:
    """Move the gradient of a leaf to the CPU as soon as a backward pass has it, all uses of the weight added up."""

    def take(leaf: Tensor) -> None:
        assert leaf.grad is not None
        gradient, leaf.grad = leaf.grad.to("cpu", wider(leaf.dtype)), None
        gradients[path] = gradients[path].add_(gradient) if path in gradients else gradient

    leaf.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]


class _Runner(fx.Interpreter):
    """Runs a graph and adds up `x.T @ x` where the rows x meet a watched weight."""

    def __init__(
        self, module: fx.GraphModule, watched: Mapping[int, Site], grams: dict[str, Tensor], mask: Tensor | None
    ) -> None:
        super().__init__(module)
        self.watched, self.grams, self.mask = watched, grams, mask

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation of the graph."""
        for names in (LINEAR, PRODUCT, ADDMM, QUANTIZED):
            if target in names:
                given = {**dict(zip(names[target], args, strict=False)), **kwargs}
                site = self.watched.get(id(given["weight"]))
                if site is not None and given["input"].shape[-1] == site.shape[1]:
                    self._add(site.path, given["input"].detach())
        return super().call_function(target, args, kwargs)

    def _add(self, path: str, x: Tensor) -> None:
        rows = x.flatten(0, -2).double()
        if self.mask is not None and self.mask.numel() == rows.shape[0]:
            rows = rows[self.mask.flatten().to(rows.device) != 0]
        gram = (rows.T @ rows).cpu()
        self.grams[path] = self.grams[path].add_(gram) if path in self.grams else gram
