"""Plan -> Plan: a strategy per site: candidates, costs, the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from surgery.compiler.algebra.affine import why_not_folded
from surgery.compiler.algebra.at_rest import reads_training
from surgery.compiler.algebra.base import KINDS, Base
from surgery.compiler.algebra.branch import FUSED
from surgery.compiler.algebra.cost import Cost, branch_is_dense, measure
from surgery.compiler.algebra.expression import Expression, Range
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.narrow import has_narrow_part
from surgery.compiler.diagnostics import Diagnostics
from surgery.compiler.plan import HALF, Candidate, Plan, Site
from surgery.compiler.quantize import STAYS
from surgery.compiler.span import Span

STRATEGIES = ("branch", "fold", "recompute")
# A byte takes as long as this many operations on an H200 (4.3 TB/s; 67 TFLOP/s in float32, some 600 in half precision).
# Only the order of the candidates matters; a processor's ratio in float32 is of the same size.
OPERATIONS_PER_BYTE = {"float32": 15, "float64": 15, "bfloat16": 140, "float16": 140}
MOST_TOKENS = 1 << 20  # beyond them all costs only grow alike, and sizes in bytes would not fit 64 bits

ROUNDED = "on demand: loses small updates to rounding"
LIVE = "it is another weight in training, and the one that a backward rebuilds is not told"
NOT_DENSE = "on demand: the branch forms no [out, in] matrix"


def run(plan: Plan) -> Plan:
    """Choose how every site is run. Raises SURG032 where the spec forces a way that is not legal."""
    diagnostics = Diagnostics()
    chooser = _Chooser(plan, diagnostics)
    known: dict[tuple[str, ...], tuple[Candidate, str, tuple[Candidate, ...]]] = {}
    sites = []
    for site in plan.sites:
        stored = (site.dtype, site.module_class, str(site.experts), str(site.quantized))
        key = (site.formula, site.strategy, *stored)
        if key not in known:
            known[key] = chooser.choose(site)
        chosen, reason, candidates = known[key]
        way = {"strategy": chosen.strategy, "operation": chosen.operation}
        sites.append(site.model_copy(update={**way, "reason": reason, "candidates": candidates}))
    diagnostics.raise_errors()
    return plan.model_copy(update={"sites": tuple(sites)})


@dataclass(frozen=True)
class Way:
    """What a strategy runs with, an operation of surgery's own or plain torch, and what that costs."""

    operation: str
    cost: Cost

    def candidate(self, strategy: str, reason: str) -> Candidate:
        """The strategy, which is legal, as the plan has it."""
        return Candidate(strategy=strategy, operation=self.operation, legal=True, reason=reason, **vars(self.cost))


@dataclass
class _Chooser:
    """Costs that are known, by what they depend on: equal equations of many layers are measured once."""

    plan: Plan
    diagnostics: Diagnostics
    _parts: dict[tuple[object, ...], int] = field(default_factory=dict)
    _costs: dict[tuple[object, ...], tuple[dict[str, Way], bool]] = field(default_factory=dict)

    def choose(self, site: Site) -> tuple[Candidate, str, tuple[Candidate, ...]]:
        """How a site is run, why, and all candidates."""
        formula = instance(self.plan, site.formula)
        illegal = why_not_folded(formula) or (STAYS if site.quantized else "")
        precision = self.plan.step.precision
        dtype = site.dtype if precision == "model" else precision  # what products run in: autocast rounds W to it
        ways, dense = self._measured(formula, site, dtype, not illegal)
        manual = {} if illegal else self._manual(dtype, dense)
        candidates = {
            strategy: ways[strategy].candidate(strategy, manual.get(strategy, ""))
            if strategy in ways
            else Candidate(strategy=strategy, flops=0, bytes=0, legal=False, reason=illegal or LIVE)
            for strategy in STRATEGIES
        }
        every = tuple(candidates.values())
        if site.strategy:
            if site.strategy not in ways:
                message = f"`strategy = {site.strategy}` is not legal: {illegal or LIVE}"
                legal = " or ".join(f"`strategy = {strategy}`" for strategy in ways)
                span = _clause(self.plan.span(site.place))
                self.diagnostics.error("SURG032", message, span, help=f"write {legal}, or leave it out")
            return candidates[site.strategy], "as the spec says", every
        times = {strategy: _time(way.cost, dtype) for strategy, way in ways.items() if strategy not in manual}
        best = min(times, key=lambda strategy: times[strategy])
        return candidates[best], _reason(best, times, illegal), every

    @staticmethod
    def _manual(dtype: str, dense: bool) -> dict[str, str]:
        """The legal strategies that a spec has to ask for, and why."""
        if dense:
            return {}
        return {"fold": ROUNDED, "recompute": ROUNDED} if dtype in HALF else {"recompute": NOT_DENSE}

    def _measured(self, formula: MethodFormula, site: Site, dtype: str, folds: bool) -> tuple[dict[str, Way], bool]:
        """Every legal strategy as it is cheapest, and whether the branch forms an `[out, in]` matrix."""
        adapter_dtype = next((tensor.dtype for tensor in site.tensors if tensor.role == "train"), site.dtype)
        tensors = tuple((tensor.name, tensor.role, tensor.shape) for tensor in formula.tensors)
        terms = tuple((self._number(term.matrix), self._number(term.input)) for term in formula.terms)
        kind = site.module_class
        stored = (site.dtype, adapter_dtype, site.module_class, site.experts, site.quantized)
        key = (formula.form, self._number(formula.expression), terms, tensors, stored, dtype)
        if key not in self._costs:
            experts = site.experts or 1  # each has its share of the tokens
            tokens = max(1, min(self.plan.tokens, MOST_TOKENS) // experts)
            dtypes = getattr(torch, site.dtype), getattr(torch, adapter_dtype)
            legal: tuple[str, ...] = STRATEGIES if folds else ("branch",)
            if reads_training(formula.expression):
                legal = tuple(strategy for strategy in legal if strategy != "recompute")
            ways = {}
            is_matrix = KINDS.get(kind, Base).is_matrix and site.experts is None
            narrow = is_matrix and not site.quantized and has_narrow_part(formula)
            for strategy in legal:
                operations = (FUSED, "") if strategy == "branch" and narrow else ("",)
                found = [
                    Way(name, measure(formula, strategy, tokens, *dtypes, kind, name) * experts) for name in operations
                ]
                ways[strategy] = min(found, key=lambda way: _time(way.cost, dtype))
            self._costs[key] = ways, folds and branch_is_dense(formula, tokens)
        return self._costs[key]

    def _number(self, root: Expression) -> int:
        """A number per expression, equal for those that differ in nothing but which entries they pick: `v[layer]`."""
        numbers: dict[int, int] = {}

        def number(node: Expression) -> int:
            if id(node) not in numbers:
                picks = tuple(part if part is None or isinstance(part, Range) else 0 for part in node.index)
                parts = tuple(map(number, node.arguments))
                key = (node.operation, node.name, node.shape, node.value, picks, parts)
                numbers[id(node)] = self._parts.setdefault(key, len(self._parts))
            return numbers[id(node)]

        return number(root)


def _time(cost: Cost, dtype: str) -> float:
    """In operations; a byte that is kept takes as much of the memory's worth as one that is moved."""
    return cost.flops + OPERATIONS_PER_BYTE[dtype] * (cost.bytes + cost.kept)


def _clause(rule: Span) -> Span:
    """The rule's `strategy = ...`, or all of the rule where that is not in its text."""
    found = re.search(r"^[^#\n]*?(\bstrategy\s*=\s*\w+)", rule.source.text[rule.start : rule.end], re.MULTILINE)
    return Span(rule.source, rule.start + found.start(1), rule.start + found.end(1)) if found else rule


def _reason(best: str, times: dict[str, float], illegal: str) -> str:
    if illegal:
        return f"nothing else is legal: {illegal}"
    others = [f"{other} {times[other] / max(1.0, times[best]):.1f}" for other in times if other != best]
    if not others:
        return "fold and recompute lose small updates to rounding"
    return " and ".join(others).replace(" ", " costs ", 1) + " times as much"
