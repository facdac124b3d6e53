"""The pipeline, and the place to start reading: text in, training step out.

    p1_parse    text                              -> Tree
    p2_check    Tree                              -> Program   names, kinds, shapes, facts; needs no model
    p3_resolve  Program + skeleton                -> Plan      sites, sizes, numbers; on the meta device
    p4_choose   Plan                              -> Plan      a strategy per site: candidates, costs, the reason
    p5_capture  model + example inputs            -> Graph     torch.export, training mode, dynamic batch and length
    p6_rewrite  Plan + Graph + Tensors            -> Graph     torch.fx: one algebra node per planned weight use
    p7_lower    Graph                             -> Graph     algebra to ops, in each site's strategy
    p8_emit     Plan + Graph                      -> step.py   the training step as readable source, which is what runs

Each pass is a module with one public function `run`, mutates nothing it was given, collects everything that is wrong
and raises it once. The trees are in `nodes.py`, the equations in `algebra/`, the plan in `plan.py`, the graph in
`graph.py`, and what is said to people in `diagnostics.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from surgery.compiler import (
    p1_parse,
    p2_check,
    p3_resolve,
    p4_choose,
    p5_capture,
    p6_rewrite,
    p7_lower,
    p8_emit,
)  # fmt: skip
from surgery.compiler.graph import Graph
from surgery.compiler.plan import Plan
from surgery.compiler.program import Program
from surgery.compiler.span import Source

PASSES: tuple[ModuleType, ...] = (
    p1_parse, p2_check, p3_resolve, p4_choose, p5_capture, p6_rewrite, p7_lower, p8_emit,
)  # fmt: skip


def check(source: Source, folder: Path) -> Program:
    """Text to a checked program."""
    return p2_check.run(p1_parse.run(source), folder)


def resolve(program: Program, skeleton: nn.Module) -> Plan:
    """A program to its plan for one model; weights are not read."""
    return p4_choose.run(p3_resolve.run(program, skeleton))


def rewrite(plan: Plan, graph: Graph, tensors: Mapping[str, Tensor]) -> Graph:
    """A captured graph to the adapted one."""
    return p7_lower.run(p6_rewrite.run(plan, graph, tensors))


def emit(plan: Plan, graph: Graph) -> str:
    """The source of step.py."""
    return p8_emit.run(plan, graph)
