"""Plan -> Plan: a strategy per site: candidates, costs, the reason."""

from __future__ import annotations

import torch

from surgery.compiler.algebra.affine import why_not_folded
from surgery.compiler.algebra.cost import Cost, measure
from surgery.compiler.algebra.instance import instance
from surgery.compiler.diagnostics import Diagnostics
from surgery.compiler.plan import Candidate, Plan, Site

STRATEGIES = ("branch", "fold")
HALF = ("bfloat16", "float16")
# A byte takes as long as this many operations in float32 on an H200 (67 TFLOP/s over 4.3 TB/s). Only the order of two
# candidates matters; a processor's ratio is of the same size.
OPERATIONS_PER_BYTE = 15
MOST_TOKENS = 1 << 20  # beyond them both costs only grow alike, and sizes in bytes would not fit 64 bits


def run(plan: Plan) -> Plan:
    """Choose how every site is run. Raises SURG032 where the spec forces a way that is not legal."""
    diagnostics = Diagnostics()
    known: dict[tuple[str, str, str], tuple[str, str, tuple[Candidate, ...]]] = {}
    sites = []
    for site in plan.sites:
        key = (site.formula, site.dtype, site.strategy)
        if key not in known:
            known[key] = _choose(plan, site, diagnostics)
        strategy, reason, candidates = known[key]
        sites.append(site.model_copy(update={"strategy": strategy, "reason": reason, "candidates": candidates}))
    diagnostics.raise_errors()
    return plan.model_copy(update={"sites": tuple(sites)})


def _choose(plan: Plan, site: Site, diagnostics: Diagnostics) -> tuple[str, str, tuple[Candidate, ...]]:
    formula, dtype = instance(plan, site.formula), site.dtype
    reason = why_not_folded(formula)
    illegal = {"fold": reason} if reason else {}
    costs = {
        strategy: _measure(plan, site.formula, strategy, dtype, site.tensors[0].dtype if site.tensors else dtype)
        for strategy in STRATEGIES
        if strategy not in illegal
    }
    candidates = tuple(
        Candidate(
            strategy=strategy,
            flops=costs[strategy].flops if strategy in costs else 0,
            bytes=costs[strategy].bytes if strategy in costs else 0,
            legal=strategy in costs,
            reason=illegal.get(
                strategy, "loses small updates to rounding" if strategy == "fold" and dtype in HALF else ""
            ),
        )
        for strategy in STRATEGIES
    )
    if site.strategy:
        if site.strategy in illegal:
            span = plan.span(site.place)
            diagnostics.error("SURG032", f"`strategy = {site.strategy}` is not legal: {illegal[site.strategy]}", span)
        return site.strategy, "as the spec says", candidates
    automatic = [strategy for strategy in costs if not (strategy == "fold" and dtype in HALF)]
    best = min(automatic, key=lambda strategy: _time(costs[strategy]))
    if len(automatic) == 1:
        others = [candidate for candidate in candidates if candidate.strategy != best]
        return best, others[0].reason and f"{others[0].strategy} {others[0].reason}", candidates
    worst = max(automatic, key=lambda strategy: _time(costs[strategy]))
    times = _time(costs[worst]) / max(1.0, _time(costs[best]))
    return best, f"{worst} costs {times:.1f} times as much", candidates


def _time(cost: Cost) -> float:
    return cost.flops + OPERATIONS_PER_BYTE * cost.bytes


def _measure(plan: Plan, key: str, strategy: str, dtype: str, adapter_dtype: str) -> Cost:
    tokens = min(plan.tokens, MOST_TOKENS)
    return measure(instance(plan, key), strategy, tokens, getattr(torch, dtype), getattr(torch, adapter_dtype))
