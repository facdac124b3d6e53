"""Plan + weights -> Tensors: the start of every tensor of every site, the same on any device and in any order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.compiler.algebra import decompose
from surgery.compiler.algebra.base import dense, logical, stacked
from surgery.compiler.algebra.evaluate import Evaluator, wider
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.formula import TensorFormula
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.quantity import value_of, whole_of
from surgery.compiler.algebra.structures.decomposition import PARTS
from surgery.compiler.diagnostics import fail
from surgery.compiler.plan import Plan, Site, TensorPlan
from surgery.runtime.calibrate import Calibration, missing
from surgery.runtime.checkpoint import weight_of
from surgery.runtime.draws import drawn, seed_of


@dataclass(frozen=True)
class Sources:
    """Where starts read what the model does not hold: the spec's folder, calibration data, or a run that has begun.

    `saved` are the tensors of a run by key: where they are given nothing is computed.
    """

    folder: Path = Path()
    calibration: Calibration | None = None
    saved: Mapping[str, Tensor] | None = None


NOTHING = Sources()


def initialise(plan: Plan, weights: Mapping[str, Tensor], sources: Sources = NOTHING) -> dict[str, Tensor]:
    """The method's tensors by key, in their dtypes, on the device of the site's W; `weights` has W by its name.

    Every draw is on the CPU in float32 from a generator seeded by (seed, path, name), so it depends on nothing else.
    Raises SURG036 where calibration data is missing, SURG037 for a checkpoint that does not fit, SURG053 for a matrix
    that is not finite, SURG054 for a tensor that is not among the saved ones.
    """
    reads_data = sources.saved is None and any(site.facts.needs_calibration for site in plan.sites)
    if reads_data and sources.calibration is None:
        raise missing(plan)
    tensors: dict[str, Tensor] = {}
    for site in plan.sites:
        formulas = {tensor.name: tensor for tensor in instance(plan, site.formula).tensors}
        begun: dict[str, Tensor] = {}
        evaluator: _Starts | None = None
        for tensor in site.tensors:
            if tensor.key not in tensors:
                if evaluator is None:
                    evaluator = _Starts(plan, site, _stored(site, weights), begun, sources)
                if sources.saved is None:
                    value = _start(plan, tensor, formulas[tensor.name], evaluator)
                else:
                    value = _saved(sources.saved, tensor)
                tensors[tensor.key] = value.to(evaluator.stored.device)
            begun[tensor.name] = tensors[tensor.key]
    return tensors


def _stored(site: Site, weights: Mapping[str, Tensor]) -> Tensor:
    """W as it is stored; of a module without a weight nothing, in the dtype and on the device of the others."""
    if site.parameter:
        held: Tensor = dense(site, weights)
        return held
    return torch.empty(0, dtype=getattr(torch, site.dtype), device=next(iter(weights.values())).device)


def _saved(saved: Mapping[str, Tensor], tensor: TensorPlan) -> Tensor:
    if tensor.key not in saved or tuple(saved[tensor.key].shape) != tensor.shape:
        message = f"`{tensor.key}` of shape {list(tensor.shape)} is not among the saved tensors"
        raise fail("SURG054", message, help="the state is of another spec or another model")
    return saved[tensor.key].to(getattr(torch, tensor.dtype), copy=True)


def _start(plan: Plan, tensor: TensorPlan, formula: TensorFormula, evaluator: _Starts) -> Tensor:
    dtype = getattr(torch, tensor.dtype)
    start = formula.start
    if start.expression is not None and start.expression.operation == "tensor":
        copied: Tensor = evaluator.tensors[start.expression.name]
        return copied.to(dtype, copy=True)
    if start.expression is not None:
        value: Tensor = evaluator(start.expression)
        # laid out as a loaded one is: products of other strides differ in the last bit
        return value.to(dtype).expand(tensor.shape).clone(memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(seed_of(plan.step.seed, tensor.key))
    numbers = [float(value_of(number)) for number in start.arguments]
    return drawn(start.name, tensor.shape, len(formula.shape), numbers, generator).to(dtype)


class _Starts(Evaluator):
    """Values of a site's start expressions over the tensors begun before; one matrix is decomposed once."""

    def __init__(self, plan: Plan, site: Site, stored: Tensor, begun: dict[str, Tensor], sources: Sources) -> None:
        super().__init__(lambda: logical(stored, site), begun, wider(stored.dtype), stacked=stacked(site))
        self.site, self.stored, self.sources = site, stored, sources
        self.seed = seed_of(plan.step.seed, f"{site.path} singular")
        self.decomposed: dict[tuple[str, Expression, int], tuple[Tensor, ...]] = {}

    def _value(self, node: Expression, stopped: bool) -> Any:
        match node.operation:
            case "weight_of":
                shape = tuple(self.stored.shape)
                found = weight_of(node.name, self.site.parameter, shape, self.sources.folder, node.span)
                return logical(found.to(self.stored.device), self.site).to(self.dtype)
            case "gradient":
                assert self.sources.calibration is not None
                gradient = self.sources.calibration.gradients[self.site.path].to(self.stored.device)
                return logical(gradient, self.site).to(self.dtype)
            case name if name in PARTS:
                return self._part(node)
        return super()._value(node, stopped)

    def _part(self, node: Expression) -> Any:
        matrix, count = node.arguments
        assert count.value is not None
        rank = int(value_of(count.value))
        if matrix.operation == "activations":
            assert self.sources.calibration is not None
            gram = self.sources.calibration.grams[self.site.path].to(self.stored.device)
            values, right = decompose.singular_of_gram(gram, rank)
            return (values if node.operation == "singular_values" else right).to(self.dtype)
        if node.operation.startswith("qr"):
            found = self._once("qr", matrix, rank)
        else:
            shape = tuple(whole_of(size) for size in matrix.shape)
            found = self._once("singular", matrix, rank if decompose.is_truncated(shape, rank) else 0)
            found = decompose.taken(found, rank)  # type: ignore[arg-type]
        return found[PARTS[node.operation]]

    def _once(self, kind: str, matrix: Expression, rank: int) -> tuple[Tensor, ...]:
        key = (kind, matrix, rank)
        if key not in self.decomposed:
            value = self(matrix)
            if not torch.isfinite(value).all():
                message = f"a start of `{self.site.path}` cannot be computed: its matrix is not finite"
                raise fail("SURG053", message, matrix.span, help="look at the weights of the checkpoint")
            if kind == "qr":
                self.decomposed[key] = decompose.orthogonal_triangular(value, rank)
            else:
                self.decomposed[key] = decompose.singular(value, rank or min(value.shape[-2:]), self.seed)
        return self.decomposed[key]
