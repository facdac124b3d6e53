"""From the plan back to algebra: the formula of a site, elaborated again from the spec's own text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from surgery.compiler import nodes, p1_parse
from surgery.compiler.algebra.affine import BIAS, Affine, NotAffine, effective
from surgery.compiler.algebra.base import dense, logical, stacked
from surgery.compiler.algebra.build import Value
from surgery.compiler.algebra.compose import compose, formula_of
from surgery.compiler.algebra.evaluate import Evaluator, wider
from surgery.compiler.algebra.expression import MARK, Expression, Shape, number
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.telescope import from_start, telescoped
from surgery.compiler.diagnostics import fail
from surgery.compiler.plan import Formula, Plan, Site
from surgery.compiler.span import Source


def build(method: nodes.Method, formula: Formula) -> MethodFormula:
    """The algebra of a method at one size; raises `SurgError` where the sizes do not fit."""
    arguments: dict[str, Value] = {
        name: value if isinstance(value, str | bool) else number(Quantity.of(value))
        for name, value in formula.arguments.items()
    }
    sizes = {"in": formula.inputs, "out": formula.outputs, **formula.coordinates}
    found, diagnostics = formula_of(method, arguments, {name: Quantity.of(size) for name, size in sizes.items()})
    diagnostics.raise_errors()
    assert found is not None
    return telescoped(found) if formula.telescope else from_start(found) if formula.from_start else found


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
    record, methods = Formula.model_validate_json(formula), _methods(texts)
    if record.method in methods:
        return build(methods[record.method], record)
    (rule,) = p1_parse.run(Source("<composition>", f"adapt x {{ with {record.method} }}")).items
    assert isinstance(rule, nodes.Adapt) and isinstance(rule.clauses[0], nodes.With)
    return build(compose(rule.clauses[0].value, methods), record)


def instance(plan: Plan, key: str) -> MethodFormula:
    """The algebra of one of the plan's formulas."""
    texts = (*plan.library.items(), (plan.file, plan.spec))  # the spec's own methods win
    return _instance(texts, plan.formulas[key].model_dump_json())


def effective_weight(plan: Plan, site: Site, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a site multiplies x with now: `[out, in]`, in float32 or W's dtype if that is wider.

    Raises SURG055 if what it computes is no such product.
    """
    weight = _effective(plan, site, weights, lambda found, shape: found.weight(shape[0]))
    assert weight is not None
    return weight


def effective_bias(plan: Plan, site: Site, weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """What a site adds now, `[out]`, or None; raises SURG055 as `effective_weight` does."""
    return _effective(plan, site, weights, lambda found, shape: found.offset)


def _effective(
    plan: Plan, site: Site, weights: Mapping[str, torch.Tensor], part: Callable[[Affine, Shape], Expression | None]
) -> torch.Tensor | None:
    formula = instance(plan, site.formula)
    try:
        node = part(effective(formula, site.bias), formula.shape)
    except NotAffine as reason:
        raise fail("SURG055", f"`{site.path}` has no weight of its own: {reason}", plan.span(site.place)) from reason
    if node is None:
        return None
    evaluator = evaluator_of(site, weights)
    if node.operation == "tensor" and node.name == BIAS:  # as it is, in its own dtype
        bias: torch.Tensor = evaluator.tensors[BIAS]
        return bias
    value: torch.Tensor = evaluator(node)
    return value


def evaluator_of(
    site: Site, weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None, base: torch.Tensor | None = None
) -> Evaluator:
    """What computes a site's expressions from its tensors as they are, by their keys, its bias called `BIAS`.

    `dtype` is float32, or W's if that is wider, where it is left out; `base` is W `[..., out, in]` in place of its own.
    """
    weight = logical(dense(site, weights), site) if base is None else base
    tensors = {tensor.name: weights[tensor.key].detach() for tensor in site.tensors}
    for name, key in site.earlier.items():
        stored = weights[key].detach()
        tensors[name] = logical(stored, site) if name.startswith(f"W{MARK}") else stored
    if site.bias:
        tensors[BIAS] = weights[bias_name(site)].detach()
    return Evaluator(lambda: weight, tensors, dtype or wider(weight.dtype), stacked=stacked(site))


def bias_name(site: Site) -> str:
    """The parameter that is the site's bias."""
    return f"{site.parameter.rpartition('.')[0]}.bias"
