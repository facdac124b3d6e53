"""`active = random(n, every = k)` of a rule: how many of its sites learn at a time, and what of it cannot be."""

from __future__ import annotations

from typing import Any

from surgery.compiler import nodes
from surgery.compiler.diagnostics import Diagnostics, fail
from surgery.compiler.plan import ActivePlan, Plan
from surgery.compiler.printer import show
from surgery.compiler.program import Program, Rule
from surgery.compiler.settings import arguments, place, whole
from surgery.optimizers import OPTIMIZERS


def read_active(node: nodes.Expr) -> dict[str, int]:
    """`random(n, every = k)`."""
    if not isinstance(node, nodes.Call) or node.function != "random":
        raise fail("SURG002", f"`random(11, every = 50)` is meant, not `{show(node)}`", node.span)
    values: dict[str, Any] = arguments(node, {"count": whole(1), "every": whole(1)})
    if len(values) < 2:
        help_text = "random(11, every = 50): 11 of the weights, others after 50 steps"
        raise fail("SURG004", "say how many weights learn at a time, and for how many steps", node.span, help=help_text)
    return values


def active(program: Program, plan: Plan, diagnostics: Diagnostics) -> tuple[ActivePlan, ...]:
    """What the plan keeps of it, rule by rule."""
    found = []
    for number, rule in enumerate(program.rules):
        if rule.active is None:
            continue
        sites = sum(site.rule == number for site in plan.sites)
        setting = _setting(rule)
        count, every = rule.active["count"], rule.active["every"]
        if count > sites:
            message = f"the rule adapts {sites} weight{'s' * (sites != 1)}, so {count} of them cannot learn at a time"
            diagnostics.error("SURG026", message, setting.span)
        found.append(ActivePlan(rule=number, count=count, sites=sites, every=every, place=place(setting.span)))
    return tuple(found)


def check_optimizer(program: Program, block: Plan, diagnostics: Diagnostics) -> None:
    """The optimizer of a `step` block has to know each tensor by itself."""
    kind = OPTIMIZERS[block.step.optimizer.name]
    if kind.needs is None or not isinstance(kind.made, type):
        return
    for rule in program.rules:
        if rule.active is not None:
            message = f"`{kind.name}` moves the factors of all weights together, and some would rest"
            help_text = "take lora_plus, adamw or sgd, which know each tensor by itself"
            diagnostics.error("SURG032", message, _setting(rule).span, help=help_text)


def _setting(rule: Rule) -> nodes.Line:
    return next(line for line in rule.node.clauses if getattr(line, "name", "") == "active")
