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
wrong and raises it once. What they pass on is in `nodes.py`, `plan.py` and `graph.py`, the equations are in `algebra/`;
`pass_log.py` says what each of them took and gave.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from torch import Tensor, nn

from surgery.compiler import p1_parse, p2_check, p3_resolve, p4_choose, p5_capture  # isort: skip
from surgery.compiler import p6_rewrite, p7_lower, p8_optimize, p9_emit  # isort: skip
from surgery.compiler.graph import Graph
from surgery.compiler.pass_log import logged
from surgery.compiler.plan import MeasuredPlan, Plan
from surgery.compiler.program import Program

Examples = Mapping[str, Tensor] | None  # inputs of a model's forward
PASSES: tuple[ModuleType, ...] = (
    p1_parse, p2_check, p3_resolve, p4_choose, p5_capture, p6_rewrite, p7_lower, p8_optimize, p9_emit,
)  # fmt: skip


def resolve(
    program: Program, skeleton: nn.Module, examples: Examples = None, saved: Plan | None = None,
    measured: tuple[MeasuredPlan, ...] | None = (),
) -> Plan:  # fmt: skip
    """A program to its plan for one model, reading no weights; `examples` or a run's `saved` plan tell output sizes.

    `measured` are the numbers of the data that rules ask for; None: a draft, in which each of them is 1.
    """
    plan: Plan = logged(p4_choose, logged(p3_resolve, program, skeleton, examples, saved, measured))
    return plan


def adapt(plan: Plan, graph: Graph, values: Mapping[str, Tensor]) -> Graph:
    """A captured graph to the adapted one, over the method's tensors by key."""
    adapted: Graph = logged(p8_optimize, logged(p7_lower, logged(p6_rewrite, plan, graph, values)))
    return adapted
