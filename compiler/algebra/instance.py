"""From the plan back to algebra: the formula of a site, elaborated again from the spec's own text."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from surgery.compiler import nodes, p1_parse
from surgery.compiler.algebra.base import logical
from surgery.compiler.algebra.build import Value, number
from surgery.compiler.algebra.evaluate import Evaluator, wider
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.method import elaborate
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.telescope import telescoped
from surgery.compiler.plan import Formula, Plan, Site
from surgery.compiler.span import Source


def build(method: nodes.Method, formula: Formula) -> MethodFormula:
    """The algebra of a method at one size; raises `SurgError` where the sizes do not fit."""
    arguments: dict[str, Value] = {
        name: value if isinstance(value, str | bool) else number(Quantity.of(value))
        for name, value in formula.arguments.items()
    }
    sizes = {"in": formula.inputs, "out": formula.outputs, **formula.coordinates}
    found, diagnostics = elaborate(method, arguments, {name: Quantity.of(size) for name, size in sizes.items()})
    diagnostics.raise_errors()
    assert found is not None
    return telescoped(found) if formula.telescope else found


Texts = tuple[tuple[str, str], ...]


@functools.lru_cache(maxsize=32)
def _methods(texts: Texts) -> Mapping[str, nodes.Method]:
    found: dict[str, nodes.Method] = {}
    for name, text in texts:
        tree = p1_parse.run(Source(name, text))
        found |= {item.name: item for item in tree.items if isinstance(item, nodes.Method)}
    return found


@functools.lru_cache(maxsize=4096)
def _instance(texts: Texts, formula: str) -> MethodFormula:
    record = Formula.model_validate_json(formula)
    return build(_methods(texts)[record.method], record)


def instance(plan: Plan, key: str) -> MethodFormula:
    """The algebra of one of the plan's formulas."""
    texts = (*plan.library.items(), (plan.file, plan.spec))  # the spec's own methods win
    return _instance(texts, plan.formulas[key].model_dump_json())


def effective_weight(plan: Plan, site: Site, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a site multiplies x with now: `[out, in]`, in float32 or W's dtype if that is wider."""
    formula = instance(plan, site.formula)
    base = logical(weights[site.parameter].detach(), site)
    tensors = {tensor.name: weights[tensor.key].detach() for tensor in site.tensors}
    evaluator = Evaluator(lambda: base, tensors, wider(base.dtype))
    value: torch.Tensor = evaluator(formula.expression)
    if formula.form == "delta":
        value = evaluator(Expression("weight", (), formula.expression.shape, name="W")) + value
    return value
