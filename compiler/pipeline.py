"""The pipeline, and the place to start reading: text in, training step out.

    p1_parse    text                    -> Tree
    p2_check    Tree                    -> Program   names, kinds, shapes, facts; needs no model
    p3_resolve  Program + skeleton      -> Plan      sites, sizes, numbers; on the meta device
    p4_choose   Plan                    -> Plan      a strategy per site: candidates, costs, the reason
    p5_capture  model + example inputs  -> Graph     torch.export, training mode, dynamic batch and length
    p6_rewrite  Plan + Graph + Tensors  -> Graph     torch.fx: one algebra node per planned weight use
    p7_lower    Graph                   -> Graph     algebra to ops, in each site's strategy
    p8_optimize Graph                   -> Graph     the same values for fewer operations and less memory
    p9_emit     Plan + Graph            -> step.py   the training step as readable source, which is what runs

Each pass is a module with one public function `run`; it mutates nothing it was given, and collects everything that is
wrong and raises it once. What they pass on is in `nodes.py`, `plan.py` and `graph.py`, the equations are in `algebra/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from torch import Tensor, fx, nn

from surgery.compiler import p1_parse, p2_check, p3_resolve, p4_choose, p5_capture  # isort: skip
from surgery.compiler import p6_rewrite, p7_lower, p8_optimize, p9_emit  # isort: skip
from surgery.compiler.diagnostics import fail
from surgery.compiler.graph import Graph, tensors
from surgery.compiler.plan import Plan
from surgery.compiler.program import Program

Examples = Mapping[str, Tensor] | None  # inputs of a model's forward
PASSES: tuple[ModuleType, ...] = (
    p1_parse, p2_check, p3_resolve, p4_choose, p5_capture, p6_rewrite, p7_lower, p8_optimize, p9_emit,
)  # fmt: skip


def resolve(program: Program, skeleton: nn.Module, examples: Examples = None, saved: Plan | None = None) -> Plan:
    """A program to its plan for one model, reading no weights; `examples` or a run's `saved` plan tell output sizes."""
    return p4_choose.run(p3_resolve.run(program, skeleton, examples, saved))


def adapt(plan: Plan, graph: Graph, values: Mapping[str, Tensor]) -> Graph:
    """A captured graph to the adapted one, over the method's tensors by key."""
    return p8_optimize.run(p7_lower.run(p6_rewrite.run(plan, graph, values)))


def rewrite(graph_module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """The adapted graph of one's own capture, with tensors at their start; the graph given is not changed.

    Raises SURG041 for a weight of the plan that the graph does not use, TypeError for what is no graph.
    """
    from surgery.runtime.correct import correct_graph
    from surgery.runtime.initialise import initialise

    if not isinstance(graph_module, fx.GraphModule):
        hint = "torch.export.export(model, inputs).module() gives one"
        raise TypeError(f"an fx.GraphModule is needed here, not a {type(graph_module).__name__}; {hint}")
    present = tensors(graph_module)
    for site in plan.sites:
        if site.parameter and site.parameter not in present:
            raise fail("SURG041", f"the graph has no `{site.parameter}`", help="it is the graph of another model")
    values = initialise(plan, present)
    rewritten = correct_graph(plan, p6_rewrite.rewrite_module(graph_module, plan, values), values)
    return p8_optimize.optimize_module(p7_lower.lower_module(rewritten))
