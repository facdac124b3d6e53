"""Which tensors are the step's own: what it may write is copied once, everything else shares the model's memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from surgery.compiler.event_program import KEPT, START, EventProgram
from surgery.compiler.graph import Graph
from surgery.compiler.plan import Plan

_Memory = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype]


def written_names(plan: Plan, graph: Graph, trained: Iterable[str], events: Iterable[EventProgram]) -> list[str]:
    """Names of all tensors that a step may write: trained ones, states, what events assign, running statistics."""
    names = dict.fromkeys(trained)
    names |= dict.fromkeys(tensor.key for site in plan.sites for tensor in site.tensors if tensor.role == "state")
    for event in events:
        for placeholder in [*_assigned(event.graph), *event.writes]:
            names |= dict.fromkeys(site[placeholder] for site in event.sites)
    return list(names | dict.fromkeys(running_statistics(graph)))


def beside(
    events: Iterable[EventProgram], weights: Mapping[str, Tensor], given: Mapping[str, Tensor], corrected: set[str]
) -> dict[str, Tensor]:
    """What events read beside the step's tensors, which no run saves.

    `NAME.before` is memory for what NAME is at the start of a step, `NAME.start` what it was at the start of the run:
    the tensor given, where it lies on the step's device the model's own memory, or a copy if it was corrected.
    """
    found: dict[str, Tensor] = {}
    for name in {name for event in events for site in event.sites for name in site.values()}:
        if name.endswith(KEPT):
            found[name] = torch.empty_like(weights[name.removesuffix(KEPT)], requires_grad=False)
        elif name.endswith(START):
            moving = name.removesuffix(START)
            own = weights[moving].detach()
            found[name] = own.clone() if moving in corrected else given[moving].detach().to(own.device)
    return found


def running_statistics(graph: Graph) -> list[str]:
    """Names of the tensors that the forward itself writes in training."""
    written = [target for node in graph.module.graph.nodes for target in written_by(node) if target.op == "get_attr"]
    return list(dict.fromkeys(str(target.target) for target in written))


def own(
    given: Mapping[str, Tensor], written: Iterable[str], trained: set[str], device: torch.device
) -> dict[str, Tensor]:
    """The step's tensors by name on `device`: own memory for `written`, and ties kept (one memory, one tensor).

    Parameters stay parameters, which require gradients if they are trained, and nothing else does.
    """
    moved = {_memory(given[name]) for name in written}
    learns = {_memory(given[name]) for name in trained}
    made: dict[_Memory, Tensor] = {}
    for tensor in given.values():
        place = _memory(tensor)
        if place in made and not isinstance(tensor, nn.Parameter):
            continue
        if place not in made:
            data = tensor.detach()
            made[place] = data.to(device, copy=True) if place in moved else data.to(device)
        if isinstance(tensor, nn.Parameter) and not isinstance(made[place], nn.Parameter):
            made[place] = nn.Parameter(made[place], requires_grad=place in learns)
    return {name: made[_memory(tensor)] for name, tensor in given.items()}


def _memory(tensor: Tensor) -> _Memory:
    if tensor.numel() == 0 or tensor.is_meta:  # no memory to share
        return (-id(tensor), 0, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
    return (tensor.data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors a node writes into."""
    if isinstance(node.target, torch._ops.OpOverload):
        found = []
        for position, argument in enumerate(node.target._schema.arguments):
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
                found.append(value)
        if "batch_norm" in str(node.target):  # its schema does not say that it writes the running statistics
            found += [value for value in node.args[3:5] if isinstance(value, fx.Node)]
        return found
    in_place = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
    return [node.args[0]] if in_place and isinstance(node.args[0], fx.Node) else []


def _assigned(graph: fx.Graph) -> list[str]:
    """Placeholders that an event writes, directly or through a view such as `W.transpose(0, 1)`."""
    found = []
    for node in graph.nodes:
        for target in written_by(node):
            while target.op == "call_method" and isinstance(target.args[0], fx.Node):
                target = target.args[0]
            if target.op == "placeholder":
                found.append(str(target.target))
    return found
