"""Plan + Graph + Tensors -> Graph: torch.fx: one algebra node per planned weight use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

from surgery.compiler.adapted import AdaptedSite
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.lower import Adaptation
from surgery.compiler.diagnostics import Diagnostics
from surgery.compiler.graph import TRAINING, Graph, copy_module, put
from surgery.compiler.graph import tensors as tensors_of
from surgery.compiler.plan import Plan, Site
from surgery.compiler.skeleton import module_weight
from surgery.compiler.span import Span

LINEAR = (torch.ops.aten.linear.default, nn.functional.linear)
ADDMM = (torch.ops.aten.addmm.default, torch.addmm)
PREFIX = "adapted"


def run(plan: Plan, graph: Graph, tensors: Mapping[str, Tensor]) -> Graph:
    """Put an algebra node at each use of a planned weight, over the method's `tensors` by key; `graph` is unchanged."""
    return replace(graph, module=rewrite_module(graph.module, plan, tensors))


def rewrite_module(module: fx.GraphModule, plan: Plan, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """`run` on a GraphModule of one's own: `torch.export.export(...).module()`, or a symbolic trace.

    Parameters are found by their names in the graph. Raises SURG041 for a weight that no linear operation uses.
    """
    twin = copy_module(module)
    named = tensors_of(twin)
    training = next((node for node in twin.graph.nodes if node.op == "placeholder" and node.name == TRAINING), None)
    diagnostics = Diagnostics()
    uses = _uses(twin, plan)
    for site in plan.sites:
        span = plan.span(site.place)
        formula = instance(plan, site.formula)
        weight = named.get(site.parameter)
        if weight is None or not uses[site.path]:
            diagnostics.error("SURG041", f"`{site.path}` is not used in the graph", span)
            continue
        if formula.dropout and training is None:
            help_text = f"give the graph an input `{TRAINING}`, or drop the dropout"
            diagnostics.error(
                "SURG041", f"the graph cannot switch the dropout of `{site.path}` off", span, help=help_text
            )
            continue
        if site.untied and site.update == "literal":  # what moves here must not move its former partner
            put(twin, site.parameter, nn.Parameter(weight.detach().clone(), weight.requires_grad))
        for tensor in site.tensors:
            put(twin, tensor.key, _stored(tensors[tensor.key], tensor.role))
        dtypes = {tensor.name: tensors[tensor.key].dtype for tensor in site.tensors}
        adaptation = Adaptation(formula, site.strategy or "branch", plan.tokens, weight.dtype, dtypes)
        for number, node in enumerate(uses[site.path]):
            operands = _operands(twin, node, site)
            if operands is None:
                message = f"`{site.parameter}` is used by {node.target}, which cannot be adapted"
                diagnostics.error("SURG041", message, span)
                continue
            target = f"{PREFIX}.{site.path}" + (f".use_{number}" if number else "")
            twin.add_submodule(target, AdaptedSite(site, adaptation, span))
            _replace(twin, node, target, operands, site, training, span)
    diagnostics.raise_errors()
    twin.graph.lint()
    twin.recompile()
    return twin


def _stored(tensor: Tensor, role: str) -> Tensor:
    return nn.Parameter(tensor) if role == "train" and not isinstance(tensor, nn.Parameter) else tensor


def _uses(module: fx.GraphModule, plan: Plan) -> dict[str, list[fx.Node]]:
    """Per site the nodes that read its weight: by every name that it has, by its own alone in an `untie` rule."""
    named = tensors_of(module)
    owners: dict[int, list[str]] = {}
    for name, tensor in named.items():
        owners.setdefault(id(tensor), []).append(name)
    by_name: dict[str, str] = {}
    for site in plan.sites:
        same = [] if site.untied or site.parameter not in named else owners[id(named[site.parameter])]
        by_name |= dict.fromkeys([site.parameter, *same], site.path)
    uses: dict[str, list[fx.Node]] = {site.path: [] for site in plan.sites}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            path = by_name.get(str(node.target))
            if path is not None:
                uses[path] += list(node.users)
        elif node.op == "call_module" and f"{node.target}.weight" in by_name:
            uses[by_name[f"{node.target}.weight"]].append(node)
    return uses


def _operands(module: fx.GraphModule, node: fx.Node, site: Site) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """x, W and the bias of a linear operation on the site's weight, or None for any other operation."""

    def is_weight(argument: object) -> bool:
        if not isinstance(argument, fx.Node) or argument.op != "get_attr":
            return False
        return attrgetter(str(argument.target))(module) is attrgetter(site.parameter)(module)

    if node.op == "call_module":
        owner = module.get_submodule(str(node.target))
        # a Conv1D module takes any leading axes, its addmm takes rows: leave that one to exported graphs
        if module_weight(owner) is None or site.transposed:
            return None
        with module.graph.inserting_before(node):
            own_weight = module.graph.get_attr(site.parameter)
            own_bias = module.graph.get_attr(f"{node.target}.bias") if owner.bias is not None else None
        return _linked(node.args[0], own_weight, own_bias)
    if node.target in LINEAR and not site.transposed and len(node.args) >= 2 and is_weight(node.args[1]):
        x, weight, bias = (*node.args, node.kwargs.get("bias"))[:3]
        return _linked(x, weight, bias)
    if node.target in ADDMM and site.transposed and len(node.args) == 3 and is_weight(node.args[2]) and not node.kwargs:
        bias, x, weight = node.args
        return _linked(x, weight, bias)
    return None


def _linked(x: object, weight: object, bias: object) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    return x, weight, bias if isinstance(bias, fx.Node) else None


def _replace(
    module: fx.GraphModule, node: fx.Node, target: str, operands: tuple[fx.Node, fx.Node, fx.Node | None], site: Site,
    training: fx.Node | None, span: Span,
) -> None:  # fmt: skip
    graph = module.graph
    with graph.inserting_before(node):
        stack = {"nn_module_stack": node.meta.get("nn_module_stack"), "span": span}
        tensors = []
        for tensor in site.tensors:
            read = graph.get_attr(tensor.key)
            read.meta.update(stack)
            tensors.append(read)
        x, weight, bias = operands
        new = graph.call_module(target, (x, weight, bias, True if training is None else training, *tensors))
    new.meta = {**node.meta, "span": span}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
