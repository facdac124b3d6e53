"""Events at the start: `at start { W -= delta }` gives a site a base weight of its own, from W and the start's factors.

The model's weight is never written and the corrected one never saved: the factors are (`A_at_start`), and whoever loads
a run corrects the model's weight again, by the same operations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.compiler.algebra.base import logical, stacked, stored_like
from surgery.compiler.algebra.evaluate import evaluate, wider
from surgery.compiler.algebra.instance import instance
from surgery.compiler.diagnostics import fail
from surgery.compiler.plan import Plan, Site


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
