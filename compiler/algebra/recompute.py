"""Recompute: the folded weight is built again in the backward and never kept.

Where the gradient reaches the tensors through a narrow product alone, no gradient of the weight is formed either
(`kernels/recompute.py`); elsewhere torch's checkpoint runs the building of the weight and its product again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from surgery.compiler.algebra.base import Base
from surgery.compiler.algebra.expression import Expression, negated, rewriting
from surgery.compiler.algebra.facts import gradients_reach, reads_weight, tensors_read
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.low_rank import factor
from surgery.compiler.algebra.previous import leaves
from surgery.compiler.algebra.recorder import Recorder
from surgery.compiler.algebra.structures import Tensor
from surgery.compiler.kernels.recompute import rebuilt_linear

WeightOf = Callable[[Base, Mapping[str, Tensor], Expression], Tensor]  # from W, the tensors and the equation


class Recomputed(nn.Module):
    """A piece of a site's computation that the backward runs again: the graph of `function`, called `name`.

    `call` is how it stands in step.py: what is called with the function, and the options behind the arguments.
    It holds no tensors, so copying and saving see none.
    """

    call: tuple[str, dict[str, Any]]

    def __init__(self, name: str, function: fx.Graph) -> None:
        super().__init__()
        self.name = name
        self.function = fx.GraphModule(nn.Module(), function, name)


class RebuiltLinear(Recomputed):
    """`rebuilt_linear` with the weight that `function` builds."""

    call = ("rebuilt_linear", {})

    def forward(self, *arguments: Tensor) -> Tensor:
        """x, the bias, the factors of the gradient, and the operands of `function`."""
        return rebuilt_linear(self.function, *arguments)


class Checkpointed(Recomputed):
    """Torch's checkpoint of a whole site."""

    call = ("checkpoint", {"use_reentrant": False, "preserve_rng_state": False})

    def forward(self, *arguments: Tensor) -> Tensor:
        """The operands of `function`."""
        result: torch.Tensor = checkpoint(self.function, *arguments, **self.call[1])
        return result


def rebuilt(
    formula: MethodFormula, weight: WeightOf, factors: tuple[Tensor, ...], x: Tensor, base: Base, bias: Tensor | None,
    tensors: Mapping[str, Tensor],
) -> Tensor:  # fmt: skip
    """`x @ weight.T + bias`, whose gradient goes to the two `factors` (to nothing where there are none)."""
    recorder = Recorder(tensors)
    function = recorder.finish(weight(replace(base, stored=recorder["W"]), recorder, value_alone(formula.expression)))
    given = {**tensors, "W": base.stored}
    operands = [given[name] for name in recorder.inputs]
    left, right = factors or (None, None)
    return _call(RebuiltLinear(f"{formula.name}_weight", function), x, bias, left, right, *operands)


def checkpointed(
    formula: MethodFormula, weight: WeightOf, x: Tensor, base: Base, bias: Tensor | None, tensors: Mapping[str, Tensor]
) -> Tensor:
    """The site as fold computes it, run a second time in the backward; every kind of weight can."""
    own: dict[str, Any] = {field.name: getattr(base, field.name) for field in fields(base) if field.name != "stored"}
    own = {name: value for name, value in own.items() if isinstance(value, torch.Tensor | fx.Proxy)}
    names = {name: _free(name, tensors) for name in (*own, "bias")}
    given = {**tensors, "x": x, "W": base.stored, **{names[name]: value for name, value in own.items()}}
    given[names["bias"]] = bias
    recorder = Recorder(tensors)
    row = recorder["x"]
    changes: dict[str, Any] = {name: recorder[names[name]] for name in own}
    inner = replace(base, stored=recorder["W"], **changes)
    matrix = weight(inner, recorder, formula.expression)
    function = recorder.finish(inner.linear(row, matrix, None if bias is None else recorder[names["bias"]]))
    owner = Checkpointed(f"{formula.name}_linear", function)
    return _call(owner, *(given[name] for name in recorder.inputs))


def _free(name: str, taken: Mapping[str, Tensor]) -> str:
    """A name for what is the site's own: a method may call a tensor so."""
    while name in taken:
        name += "_"
    return name


def _call(owner: Recomputed, *arguments: Tensor | None) -> Tensor:
    """The call itself on tensors; on proxies a node of their graph, whose tracer knows where the module goes."""
    tracer = next((value.tracer for value in arguments if isinstance(value, fx.Proxy)), None)
    return owner(*arguments) if tracer is None else tracer.call(owner, *arguments)  # type: ignore[attr-defined]


def value_alone(expression: Expression) -> Expression:
    """An expression of the same value, without what says how its gradient goes."""
    alone = rewriting(lambda node: node.arguments[0] if node.operation in ("surrogate", "stop") else node)
    return alone(expression)


# --- through what the gradient goes -----------------------------------------------------------------------------------


def gradient_factors(formula: MethodFormula) -> tuple[Expression, ...] | None:
    """Matrices L, R, narrow and without W, such that the tensors' gradients are those of `L @ R`.

    Nothing at all (an empty tuple) where no tensor gets a gradient; None where there are no such factors.
    """
    reads = _gradient(formula.expression, formula.trained)
    if reads is None:
        return ()
    factors = factor(reads)
    weights = {leaf for leaf, (name, _) in leaves(formula).items() if name == "W"}
    if factors is None or any(reads_weight(side) or weights & tensors_read(side) for side in factors):
        return None
    width = factors[0].shape[-1].whole
    sides = [size.whole or 0 for size in formula.expression.shape]
    return factors if width is not None and width < min(sides) else None


def _gradient(node: Expression, trained: frozenset[str]) -> Expression | None:
    """An expression with the gradients of `node`, without surrogates where that is linear; None where all are zero.

    What holds no trained tensor is dropped from sums, so its value is another one.
    """
    parts = node.arguments
    if not has_gradient(node, trained):
        return None
    match node.operation:
        case "surrogate":
            return _gradient(parts[1], trained)
        case "add" | "subtract" if all(part.shape == node.shape for part in parts):
            first, second = (_gradient(part, trained) for part in parts)
            if first is None and second is not None and node.operation == "subtract":
                return negated(second)
            if first is None or second is None:
                return first or second
            return replace(node, arguments=(first, second))
        case "negate" | "transpose" | "slice" | "multiply" | "divide" | "matmul":
            moving = [has_gradient(part, trained) for part in parts]
            if sum(moving) == 1 and not (node.operation == "divide" and moving[1]):
                inner = tuple(_gradient(part, trained) or part for part in parts)
                return replace(node, arguments=inner)
    return node


def has_gradient(node: Expression, trained: frozenset[str]) -> bool:
    """Whether a trained tensor gets a gradient through the expression; of earlier blocks by their names there."""
    return not trained.isdisjoint(gradients_reach(node))
