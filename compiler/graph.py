"""The captured model: a plain torch.fx graph over the model's own tensors, which every later pass takes and gives."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from surgery.compiler.diagnostics import Diagnostic

TRAINING = "training"
EARLIER = "earlier"  # in the meta of a node that reads a tensor of an earlier block
HANDED_ON = "handed_on"  # in the meta of a node that a later block reads as the x of this one


@dataclass(frozen=True)
class Graph:
    """A captured model.

    `module` takes the tensors named in `inputs`, then `training` (bool, True if left out), which drives every dropout
    and every running statistic. Its `get_attr` nodes carry the model's own full names ("encoder.layer.0.dense.weight")
    and share the model's very tensors, both names of a tied pair included; its operations are aten's, as
    `torch.export` gives them before any decomposition. Every node has `meta["nn_module_stack"]` and `meta["val"]`.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    output: Literal["logits", "tree"]  # the logits tensor, or the flat list of the module's outputs
    output_spec: pytree.TreeSpec | None = None  # rebuilds the outputs where `output` is "tree"
    warnings: tuple[Diagnostic, ...] = ()
    log: tuple[str, ...] = ()  # what the optimizations did: "12 groups of sites that read one input"

    def rebuild(self, outputs: Any) -> Any:
        """What the model itself would have returned, from what `module` returned (logits stay logits)."""
        if self.output == "logits" or self.output_spec is None:
            return outputs
        return pytree.tree_unflatten(list(outputs), self.output_spec)

    def copy(self) -> Graph:
        """A graph that a pass may change: new nodes with copied `meta`, the same tensors."""
        return replace(self, module=copy_module(self.module))


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with its own nodes that shares every tensor and submodule (a deep copy would clone them)."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, copied)
    output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    graph.output(result).meta = copy.copy(output.meta)
    for node, twin in copied.items():
        twin.meta = copy.copy(node.meta)
    graph.set_codegen(copy.copy(module.graph._codegen))  # how an exported module takes its arguments
    copied_module = fx.GraphModule(module, graph, type(module).__name__)
    transient = non_persistent(module)
    for name, tensor in tensors(module).items():  # GraphModule took over only what the graph reads
        put(copied_module, name, tensor, persistent=name not in transient)
    copied_module.training = module.training
    return copied_module


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by every name it has: tied ones appear under each, as the same object."""
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def non_persistent(module: nn.Module) -> set[str]:
    """Full names of the buffers that `state_dict` leaves out."""
    return {
        f"{path}.{name}" if path else name
        for path, owner in module.named_modules(remove_duplicate=False)
        for name in owner._non_persistent_buffers_set
    }


def called_modules(module: fx.GraphModule) -> dict[str, nn.Module]:
    """The submodules that its graph calls, by name; in a lowered graph they hold no tensors."""
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    return {name: module.get_submodule(name) for name in names}


def build_module(
    graph: fx.Graph,
    named: dict[str, Tensor],
    transient: set[str],
    class_name: str = "Captured",
    called: Mapping[str, nn.Module] | None = None,
) -> fx.GraphModule:
    """A GraphModule over `graph` with exactly the tensors of `named`; buffers in `transient` are not persistent."""
    root = fx.GraphModule({}, fx.Graph())
    for name, owner in (called or {}).items():
        root.add_submodule(name, owner)
    for name, tensor in named.items():
        put(root, name, tensor, persistent=name not in transient)
    module = fx.GraphModule(root, graph, class_name)
    for name, tensor in named.items():  # GraphModule took over only what the graph reads
        put(module, name, tensor, persistent=name not in transient)
    return module


def put(module: nn.Module, name: str, tensor: Tensor, *, persistent: bool = True) -> None:
    """Set a parameter or buffer at a full name and make the modules on the way to it."""
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(last, tensor)
    else:
        module._parameters.pop(last, None)
        module.register_buffer(last, tensor, persistent=persistent)


def drop_dead_nodes(graph: fx.Graph) -> None:
    """Remove nodes that nobody reads, except the inputs and operations that write into a tensor."""
    graph.eliminate_dead_code(is_impure_node=_keeps)


def _keeps(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or writes(node)


def is_constant(name: str) -> bool:
    """Whether a tensor is a number in the model's code, which export gave a name where it found it."""
    return re.search(r"(^|\.)(lifted_tensor_|_tensor_constant)\d+$", name) is not None


def writes(node: fx.Node) -> bool:
    """Whether the node's operation writes into one of its arguments."""
    if node.op == "call_method":  # as torch names its methods; what Python itself calls is __getitem__ and the like
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
