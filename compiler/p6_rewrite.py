"""Plan + Graph + Tensors -> Graph: torch.fx: one algebra node per planned weight use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from surgery.compiler.adapted import AdaptedSite
from surgery.compiler.algebra.at_rest import reads_training
from surgery.compiler.algebra.base import stacked
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.lower import Adaptation
from surgery.compiler.diagnostics import Diagnostics
from surgery.compiler.graph import EARLIER, HANDED_ON, TRAINING, Graph, copy_module, put
from surgery.compiler.graph import tensors as tensors_of
from surgery.compiler.plan import Plan, Site
from surgery.compiler.span import Span
from surgery.compiler.uses import Misuse, Use, call_of, flipped, inline, outputs_of, uses_of

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
    current: dict[fx.Node, fx.Node] = {}  # what stands where a use stood: the x of another may have been its result
    handed_on = {(site.rule, site.kind) for site in plan.sites if site.earlier_inputs}
    for site in plan.sites:
        span = plan.span(site.place)
        formula = instance(plan, site.formula)
        weight = named.get(site.parameter)
        if not uses[site.path]:
            reason = "is not used in the graph" if site.parameter else "has no one output tensor in the graph"
            diagnostics.error("SURG041", f"`{site.path}` {reason}", span)
            continue
        live = "dropout" if formula.dropout else "training" if reads_training(formula.expression) else ""
        if live and training is None:
            help_text = f"give the graph an input `{TRAINING}`, or leave it out of the method"
            message = f"the graph cannot switch the {live} of `{site.path}` off"
            diagnostics.error("SURG041", message, span, help=help_text)
            continue
        moves = site.update == "literal" or formula.corrections
        if weight is not None and site.untied and moves:  # what moves here must not move its former partner
            put(twin, site.parameter, nn.Parameter(weight.detach().clone(), weight.requires_grad))
        for tensor in site.tensors:
            put(twin, tensor.key, _stored(tensors[tensor.key], tensor.role))
        dtypes = {tensor.name: tensors[tensor.key].dtype for tensor in site.tensors}
        dtypes |= {name: (tensors if key in tensors else named)[key].dtype for name, key in site.earlier.items()}
        strategy = site.strategy or "branch"
        dtype = _dtype(site, weight)
        adaptation = Adaptation(formula, strategy, plan.tokens, dtype, dtypes, stacked(site), site.operation)
        for reason in dict.fromkeys(use.reason for use in uses[site.path] if isinstance(use, Misuse)):
            diagnostics.error("SURG041", f"`{site.parameter}` cannot be adapted: {reason}", span)
        for number, use in enumerate(uses[site.path]):
            if isinstance(use, Misuse):
                continue
            target = f"{PREFIX}.{site.path}" + (f".use_{number}" if number else "" if site.parameter else ".output")
            own = replace(adaptation, formula=flipped(formula)) if use.flipped else adaptation
            twin.add_submodule(target, AdaptedSite(site, own, use.base, span))
            before = {name: _input_of(uses[path], number, current) for name, path in site.earlier_inputs.items()}
            if None in before.values():
                message = f"`{site.path}` is used more often than the site that `previous` reads"
                diagnostics.error("SURG041", message, span)
                continue
            current[use.node] = _replace(
                twin, use, target, site, training, before, current, (site.rule, site.kind) in handed_on, span
            )
    diagnostics.raise_errors()
    twin.graph.lint()
    twin.recompile()
    return twin


def _dtype(site: Site, weight: Tensor | None) -> torch.dtype:
    """Of W and of the activations; codes in few bits do not tell it."""
    told: torch.dtype = getattr(torch, site.dtype)
    return told if weight is None or site.quantized else weight.dtype


def _stored(tensor: Tensor, role: str) -> Tensor:
    return nn.Parameter(tensor) if role == "train" and not isinstance(tensor, nn.Parameter) else tensor


def _uses(module: fx.GraphModule, plan: Plan) -> dict[str, list[Use | Misuse]]:
    """Per site the uses of its weight: by every name that it has, by its own alone in an `untie` rule."""
    named = tensors_of(module)
    owners: dict[int, list[str]] = {}
    for name, tensor in named.items():
        owners.setdefault(id(tensor), []).append(name)
    by_name: dict[str, Site] = {}
    for site in plan.sites:
        same = [] if site.untied or site.parameter not in named else owners[id(named[site.parameter])]
        by_name |= dict.fromkeys([site.parameter, *same], site) if site.parameter else {}
    uses: dict[str, list[Use | Misuse]] = {
        site.path: [] if site.parameter else list(outputs_of(module.graph, site)) for site in plan.sites
    }
    for node in list(module.graph.nodes):
        if node.op == "call_module" and f"{node.target}.weight" in by_name:
            inline(module, node)
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and str(node.target) in by_name:
            site = by_name[str(node.target)]
            uses[site.path] += uses_of(node, site, _dtype(site, named[site.parameter]))
    return uses


def _input_of(uses: list[Use | Misuse], number: int, current: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    """The x of one use of a site."""
    use = uses[number] if number < len(uses) else None
    if not isinstance(use, Use):
        return None
    return current.get(use.x, use.x)


def _replace(
    module: fx.GraphModule, use: Use, target: str, site: Site, training: fx.Node | None,
    before: Mapping[str, fx.Node | None], current: Mapping[fx.Node, fx.Node], handed_on: bool, span: Span,
) -> fx.Node:  # fmt: skip
    graph, node = module.graph, use.node
    with graph.inserting_before(node):
        stack = {"nn_module_stack": node.meta.get("nn_module_stack"), "span": span}
        tensors = []
        for name, key in [*((tensor.name, tensor.key) for tensor in site.tensors), *site.earlier.items()]:
            read = graph.get_attr(key)
            read.meta.update(stack)
            if name in site.earlier:
                read.meta[EARLIER] = True
            tensors.append(read)
        live = True if training is None else training
        x = current.get(use.x, use.x)
        if handed_on:
            x.meta[HANDED_ON] = True
        new = graph.call_module(target, (x, use.weight, use.bias, live, *tensors, *before.values(), *use.extra))
    new.meta = {**node.meta, "span": span}
    if node is use.x:  # an output stays, and is what the method reads
        node.append(new)
        for user in [user for user in node.users if user is not new and call_of(user, site.path) is None]:
            user.replace_input_with(node, new)
        return new
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new
