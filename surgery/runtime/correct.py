"""Events at the start: `at start { W -= delta }` gives a site a base weight of its own, from W and the start's factors.

The model's weight is never written and the corrected one never saved: the factors are (`A_at_start`), and whoever loads
a run corrects the model's weight again, by the same operations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from surgery.compiler.algebra.base import logical, stacked, stored_like
from surgery.compiler.algebra.evaluate import evaluate, wider
from surgery.compiler.algebra.instance import instance
from surgery.compiler.diagnostics import fail
from surgery.compiler.graph import put
from surgery.compiler.graph import tensors as tensors_of
from surgery.compiler.plan import Plan, Site

CORRECTED = "corrected"  # where a graph of one's own keeps the weights that were corrected


def corrected_sites(plan: Plan) -> list[Site]:
    """The sites whose W an event changes at the start."""
    return [site for site in plan.sites if instance(plan, site.formula).corrections]


@torch.no_grad()
def corrected(plan: Plan, site: Site, stored: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A site's weight after the events at the start, as `stored` (the model's own) is laid out, in its dtype.

    `tensors` holds the method's by key. Computed in float32 or wider, and rounded once. Raises SURG032 where a norm's
    weight would be no diagonal any more.
    """
    weight = logical(stored.detach(), site).to(wider(stored.dtype))
    values = {tensor.name: tensors[tensor.key].detach() for tensor in site.tensors}
    for change in instance(plan, site.formula).corrections:
        weight = evaluate(change.result, weight, values, weight.dtype, stacked(site))
    moved: Tensor = stored_like(weight, site)
    if not torch.equal(logical(moved, site), weight):
        message = f"the event at the start leaves no weight that a {site.module_class} could hold"
        raise fail("SURG032", message, plan.span(site.place), help=f"adapt `{site.path}` with another method")
    return moved.to(stored.dtype).contiguous()


def correct_graph(plan: Plan, module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """A rewritten graph whose sites read their corrected weights; `module`'s own nodes are changed, its tensors not."""
    named = tensors_of(module)
    for site in corrected_sites(plan):
        own = corrected(plan, site, named[site.parameter], tensors)
        name = f"{CORRECTED}.{site.parameter}"  # beside the modules of the graph given, which this one shares
        put(module, name, nn.Parameter(own, requires_grad=False))
        for node in module.graph.nodes:
            if node.op == "get_attr" and named.get(str(node.target)) is named[site.parameter]:
                node.target = name
    return module
