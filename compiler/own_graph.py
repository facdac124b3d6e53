"""The passes over a captured graph of one's own, without a step around it."""

from __future__ import annotations

from torch import fx

from surgery.compiler import p6_rewrite, p7_lower, p8_optimize
from surgery.compiler.diagnostics import fail
from surgery.compiler.graph import tensors
from surgery.compiler.plan import Plan


def rewrite(graph_module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """The adapted graph of one's own capture, with tensors at their start; the graph given is not changed.

    Raises SURG041 for a weight of the plan that the graph does not use, TypeError for what is no graph or no plan.
    """
    from surgery.runtime.correct import correct_graph
    from surgery.runtime.initialise import initialise

    if not isinstance(graph_module, fx.GraphModule):
        hint = "torch.export.export(model, inputs).module() gives one"
        raise TypeError(f"an fx.GraphModule is needed here, not a {type(graph_module).__name__}; {hint}")
    if not isinstance(plan, Plan):
        hint = "surgery.plan(program, model) makes one"
        raise TypeError(f"a surgery.Plan is needed here, not a {type(plan).__name__}; {hint}")
    present = tensors(graph_module)
    for site in plan.sites:
        if site.parameter and site.parameter not in present:
            raise fail("SURG041", f"the graph has no `{site.parameter}`", help="it is the graph of another model")
    values = initialise(plan, present)
    rewritten = correct_graph(plan, p6_rewrite.rewrite_module(graph_module, plan, values), values)
    return p8_optimize.optimize_module(p7_lower.lower_module(rewritten))
