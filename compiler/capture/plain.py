"""From torch.export's program to a plain graph: the model's own names, no regions, `training` as an input."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.node import map_arg

from surgery.compiler.graph import TRAINING, build_module, drop_dead_nodes, non_persistent, tensors

ROOT = "model"  # attribute of the wrapper module that holds the user's model
_FLAGS = ("train", "training", "use_input_stats")
_ASSERTIONS = {
    # They pin what the example happened to be (a dtype that autocast changes, a size), and clutter the emitted code.
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten.sym_constrain_range.default,
}


class Uncapturable(Exception):
    """Raised with a reason in plain words where the exported program has no plain form."""


def plain(exported: ExportedProgram, model: nn.Module, inputs: tuple[str, ...], *, single: bool) -> fx.GraphModule:
    """The exported wrapper as a GraphModule over the model's own tensors.

    `inputs` name its tensor inputs in order; it returns the one output there is (`single`), else the list of them.
    """
    signature, source = exported.graph_signature, exported.graph_module
    named, transient = tensors(model), non_persistent(model)
    for kind in {spec.kind for spec in signature.input_specs} & {InputKind.CUSTOM_OBJ, InputKind.TOKEN}:
        raise Uncapturable(f"the model holds a {kind.name.lower().replace('_', ' ')} that is no tensor")
    mutated = [spec.target for spec in signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]
    if mutated:
        raise Uncapturable(f"the forward replaces {mutated[0]} instead of writing into it")

    graph = fx.Graph()
    names = iter(inputs)
    read: dict[fx.Node, str] = {}  # placeholder of a parameter, buffer or constant -> its full name
    copied: dict[fx.Node, fx.Node] = {}
    placeholders = [node for node in source.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            copied[node] = graph.placeholder(next(names))
            copied[node].meta = _meta(node, model)
        else:
            assert spec.target is not None
            read[node] = spec.target.removeprefix(ROOT + ".")
            if spec.kind is InputKind.CONSTANT_TENSOR and read[node] not in named:
                named[read[node]] = exported.constants[spec.target]
                transient.add(read[node])
    training = graph.placeholder(TRAINING, type_expr=bool, default_value=True)
    training.meta = {"val": True, "nn_module_stack": _root_stack(model)}

    groups = _tied(named)
    leaves: dict[str, fx.Node] = {}

    def value(user: fx.Node, node: fx.Node) -> fx.Node:
        """The copy of `node` as `user` reads it: a tied parameter by the name that belongs to the user's module."""
        if node in copied:
            return copied[node]
        target = _local_name(groups[read[node]], user)
        if target not in leaves:
            leaves[target] = graph.get_attr(target)
            leaves[target].meta = _meta(node, model)
        return leaves[target]

    def copy_nodes(owner: nn.Module, body: fx.Graph) -> Any:
        for node in body.nodes:
            if node.op == "output":
                return map_arg(node.args[0], partial(value, node))
            if node.op == "placeholder" or (node.op == "get_attr" and _is_region(owner, node)):
                continue
            if node.op != "call_function" or node.target in _ASSERTIONS:
                if node.op not in ("call_function", "get_attr"):
                    raise Uncapturable(f"the graph holds a {node.op} of {node.target}")
                continue
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                inline(owner, node)
            elif node.target is operator.getitem and isinstance(copied.get(node.args[0]), tuple):
                copied[node] = copied[node.args[0]][node.args[1]]  # type: ignore[index]
            else:
                copied[node] = graph.node_copy(node, partial(value, node))
                copied[node].meta = _meta(node, model)
        raise AssertionError("a graph without an output")

    def inline(owner: nn.Module, node: fx.Node) -> None:
        """Copy the body of a region in which gradients are off, and cut the gradient where it leaves the region."""
        if node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            raise Uncapturable(f"the forward uses {str(node.target).replace('_', ' ')}, which has no plain form yet")
        enabled, region, *arguments = node.args
        assert isinstance(region, fx.Node)
        body = owner.get_submodule(str(region.target))
        assert isinstance(body, fx.GraphModule)
        outer = [node for node in body.graph.nodes if node.op == "placeholder"]
        for inner, argument in zip(outer, arguments, strict=True):
            assert isinstance(argument, fx.Node)
            if argument in copied:
                copied[inner] = copied[argument]
            else:
                read[inner] = read[argument]
        before = set(graph.nodes)
        results = copy_nodes(body, body.graph)
        cut = not enabled and any(_differentiable(new, before, named) for new in graph.nodes if new not in before)
        values = tuple(_detached(graph, result) if cut else result for result in results)
        copied[node] = values  # type: ignore[assignment]

    outputs = list(copy_nodes(source, source.graph))
    graph.output(outputs[0] if single else outputs).meta = {"nn_module_stack": _root_stack(model)}
    _drive_training(graph, training)
    _simplify(graph)
    drop_dead_nodes(graph)
    graph.lint()
    return build_module(graph, named, transient)


def _is_region(owner: nn.Module, node: fx.Node) -> bool:
    return isinstance(getattr(owner, str(node.target), None), fx.GraphModule)


def _differentiable(node: fx.Node, outside: set[fx.Node], named: dict[str, Tensor]) -> bool:
    # A gradient enters a region through a parameter or through a floating-point value computed outside of it.
    def enters(argument: fx.Node) -> bool:
        if argument.op == "get_attr":
            return isinstance(named[str(argument.target)], nn.Parameter)
        example = argument.meta.get("val")
        return argument in outside and isinstance(example, Tensor) and example.is_floating_point()

    return any(enters(argument) for argument in node.all_input_nodes)


def _detached(graph: fx.Graph, node: Any) -> Any:
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
        return node
    if not node.meta["val"].is_floating_point():
        return node
    cut = graph.call_function(torch.ops.aten.detach.default, (node,))
    cut.meta = dict(node.meta)
    return cut


def _meta(node: fx.Node, model: nn.Module) -> dict[str, Any]:
    """The node's meta with paths as the user's model has them: the wrapper's own level is taken out."""
    stack = {}
    for key, (path, owner) in node.meta.get("nn_module_stack", {}).items():
        if path == ROOT or path.startswith(ROOT + "."):
            stack[key] = (path[len(ROOT) + 1 :], owner)
    return {**node.meta, "nn_module_stack": stack or _root_stack(model)}


def _root_stack(model: nn.Module) -> dict[str, tuple[str, str]]:
    return {f"L__self___{ROOT}": ("", f"{type(model).__module__}.{type(model).__qualname__}")}


def _tied(named: dict[str, Tensor]) -> dict[str, list[str]]:
    """For every name, all names of the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in named.items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: groups[id(tensor)] for name, tensor in named.items()}


def _local_name(names: list[str], user: fx.Node) -> str:
    """The name of a tied tensor under the module that reads it: export keeps one name for all its readers."""
    if len(names) > 1:
        for path, _ in reversed(user.meta.get("nn_module_stack", {}).values()):
            path = path.split("@")[0].removeprefix(ROOT).removeprefix(".")
            for name in names:
                if path and name.startswith(path + "."):
                    return name
    return names[0]


def _drive_training(graph: fx.Graph, training: fx.Node) -> None:
    """Give every operation that export captured in training mode the `training` input instead of its baked-in flag."""
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for position, argument in enumerate(node.target._schema.arguments):
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if argument.name in _FLAGS and given is True and _has_statistics(node):
                _set_argument(node, position, argument.name, training)
            elif argument.name == "dropout_p" and isinstance(given, float) and given > 0:
                with graph.inserting_before(node):
                    probability = graph.call_function(operator.mul, (training, given))
                probability.meta = {"val": given, "nn_module_stack": node.meta["nn_module_stack"]}
                _set_argument(node, position, argument.name, probability)
        if node.target is torch.ops.aten.add_.Tensor and _is_batch_counter(node.args[0]):
            node.update_arg(1, training)  # True counts as 1: evaluation leaves the number of batches alone


def _has_statistics(node: fx.Node) -> bool:
    # Without running statistics a normalisation uses the batch's in evaluation too.
    if node.target in (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default):
        return node.args[3] is not None
    return True


def _is_batch_counter(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and str(node.target).endswith("num_batches_tracked")


def _set_argument(node: fx.Node, position: int, name: str, value: fx.Node) -> None:
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def _simplify(graph: fx.Graph) -> None:
    """Take out what export adds and what does nothing: slices of everything, the two-step copy of a constant."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and tuple(node.args[2:]) == (0, 2**63 - 1) and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.lift_fresh_copy.default:
            node.target = aten.clone.default
        elif node.target is aten.detach_.default and node.args[0].target is aten.clone.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
