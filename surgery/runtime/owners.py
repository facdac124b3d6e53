"""Module scope for what no module can be put in the place of: parameters that another class uses, and outputs.

The module stays where it is and keeps its names; its class becomes a subclass that computes the parameter, or changes
the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from surgery.compiler.algebra.affine import why_not_folded
from surgery.compiler.algebra.base import Base, Output, logical, stacked, stored_like
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.lower import Adaptation
from surgery.compiler.algebra.recorder import Recorder
from surgery.compiler.diagnostics import fail
from surgery.compiler.graph import TRAINING
from surgery.compiler.kernels.over_processes import is_spread
from surgery.compiler.plan import Plan, Site

Lowered = tuple[fx.GraphModule, tuple[str, ...]]  # a computation without state, and the names of what it reads


class AdaptedOwner(nn.Module):
    """What a module becomes that computes a parameter or changes its output; its own class is the other base."""


def computed_parameter(
    owner: nn.Module, name: str, lowered: Lowered, read: Mapping[str, tuple[nn.Module, str]]
) -> None:
    """Let `owner.name` be what the computation gives for the stored parameter and the tensors of the method."""
    function, inputs = lowered

    def value(self: nn.Module) -> Any:
        computation, places = self.__dict__["_surgery_computed"][name]
        stored = self._parameters[name]
        if stored is not None and is_spread(stored):  # FSDP2 looks for what it has put there; in a forward it is whole
            return stored
        operands = [stored if key == "W" else attrgetter(places[key][1])(places[key][0]) for key in inputs]
        return computation(*operands)

    owner.__dict__.setdefault("_surgery_computed", {})[name] = (function, dict(read))
    _become(owner, {name: property(value)})


def changed_output(owner: nn.Module, size: int, lowered: Lowered, read: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Let the first tensor `[..., size]` of the module's output go through the computation.

    The forward raises SURG060 where its output has none.
    """
    function, inputs = lowered
    own = type(owner).forward

    def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        computation, places = self.__dict__["_surgery_output"]
        leaves, structure = pytree.tree_flatten(own(self, *arguments, **named))
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1 and leaf.shape[-1] == size:
                given = {"x": leaf, TRAINING: self.training}
                operands = [
                    given[key] if key in given else attrgetter(places[key][1])(places[key][0]) for key in inputs
                ]
                leaves[number] = computation(*operands)
                return pytree.tree_unflatten(leaves, structure)
        message = f"{type(self).__name__} gives no tensor of {size} columns here, which its method was made for"
        raise fail("SURG060", message, help="adapt a module whose output always has that size")

    owner.__dict__["_surgery_output"] = (function, dict(read))
    _become(owner, {"forward": forward})


def _become(owner: nn.Module, members: dict[str, Any]) -> None:
    kind = type(owner)
    if issubclass(kind, AdaptedOwner):  # a second parameter of the same module
        owner.__class__ = type(kind.__name__, (kind,), members)
    else:
        owner.__class__ = type(f"Adapted{kind.__name__}", (AdaptedOwner, kind), members)


def lower_parameter(plan: Plan, site: Site, values: Mapping[str, Tensor]) -> Lowered:
    """The effective weight as it is stored, from `W` and the method's tensors; SURG060 where nothing can be folded."""
    formula = instance(plan, site.formula)
    if reason := why_not_folded(formula):
        message = f"in module scope `{site.path}` can only be a weight that is computed, but {reason}"
        raise fail("SURG060", message, plan.span(site.place), help="use surgery.compile, which sees where it is used")
    adaptation = _adaptation(plan, site, values)
    recorder = Recorder(_names(site))
    weight = logical(recorder["W"], site)
    base = Base(weight, False, adaptation.dtype)
    value = adaptation.weight(base, recorder, formula.expression)
    return fx.GraphModule(nn.Module(), recorder.finish(stored_like(value, site))), tuple(recorder.inputs)


def lower_output(plan: Plan, site: Site, values: Mapping[str, Tensor]) -> Lowered:
    """The changed output, from the module's own as `x`, `training`, and the method's tensors."""
    adaptation = _adaptation(plan, site, values)
    recorder = Recorder(_names(site))
    x = recorder["x"]
    live: Any = recorder[TRAINING] if adaptation.formula.dropout else False
    base = Output(x, False, adaptation.dtype)
    value = adaptation(x, base, None, recorder, live)
    return fx.GraphModule(nn.Module(), recorder.finish(value)), tuple(recorder.inputs)


def _adaptation(plan: Plan, site: Site, values: Mapping[str, Tensor]) -> Adaptation:
    dtypes = {tensor.name: values[tensor.key].dtype for tensor in site.tensors}
    dtype = getattr(torch, site.dtype)
    return Adaptation(instance(plan, site.formula), "branch", plan.tokens, dtype, dtypes, stacked(site))


def _names(site: Site) -> dict[str, str]:
    return {tensor.name: tensor.key for tensor in site.tensors}
