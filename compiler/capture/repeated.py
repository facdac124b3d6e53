"""Blocks of one kind are captured once: the others stand in the graph as one call each, and are written out from it.

While the model is exported, the forward of a block that is like one before it, called with arguments like that one's,
is not run: a single node takes its place. So everything around the blocks is captured as it is, however long the list,
and the time of a capture hardly grows with the depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import SymInt, Tensor, fx, nn

from surgery.compiler.capture.alike import Unread, Unreadable, fields, groups, immutable, is_changed
from surgery.compiler.graph import is_constant, writes

LEAST = 3  # blocks of one kind; with fewer there is little to save
Key = tuple[Any, ...]


class NotAlike(Exception):
    """Raised where blocks turn out not to be what one capture of them would make of them all."""


@torch.library.custom_op("surgery::enter_block", mutates_args=())
def enter_block(x: Tensor, kind: int, place: int) -> Tensor:
    """A tensor as the captured block of a kind is given it, at a place among its arguments."""
    return x.clone()


@torch.library.custom_op("surgery::leave_block", mutates_args=())
def leave_block(x: Tensor, kind: int, place: int) -> Tensor:
    """A tensor as that block gives it."""
    return x.clone()


@torch.library.custom_op("surgery::call_block", mutates_args=())
def call_block(inputs: list[Tensor], like: list[Tensor], kind: int, number: int) -> list[Tensor]:
    """Another block of the kind: as many results as `like` has tensors, of their sizes."""
    raise AssertionError("this stands in a graph for a moment, and never runs")


@enter_block.register_fake
@leave_block.register_fake
def _(x: Tensor, kind: int, place: int) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _never(context: Any, *gradients: Any) -> Any:
    raise AssertionError("nothing is differentiated while a model is captured")


for _operator in (enter_block, leave_block, call_block):
    _operator.register_autograd(_never)


@call_block.register_fake
def _(inputs: list[Tensor], like: list[Tensor], kind: int, number: int) -> list[Tensor]:
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in like]


@dataclass
class _Kind:
    """Blocks that give the same graph for the same arguments; the first of them is captured as it is."""

    path: str
    outputs: list[Any] = field(default_factory=list)
    spec: pytree.TreeSpec | None = None


class Repeated:
    """The blocks of a model that are alike, what stands for them while it is exported, and what they become then."""

    def __init__(self, model: nn.Module) -> None:
        self.groups = list(groups(model, LEAST))
        self.kinds: dict[Key, _Kind] = {}
        self.calls: list[str] = []  # the block that each call node stands for
        self.called: set[str] = set()
        self.doubt = ""  # kept, should the model catch what is raised

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Calls in place of blocks, meanwhile. Raises NotAlike, also where the model catches it."""
        put: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for group, (blocks, numbers) in enumerate(self.groups):
                for path, block in blocks.items():
                    for place, name in numbers:
                        inside = block.get_submodule(place).__dict__
                        put.append((inside, name, inside[name]))
                        inside[name] = Unreadable()
                    block.__dict__["forward"] = self._forward(group, path, block, block.forward)
            try:
                yield
            except Unread as reason:
                raise NotAlike("a block reads its own number") from reason
            if self.doubt:
                raise NotAlike(self.doubt)
        finally:
            for blocks, _ in self.groups:
                for block in blocks.values():
                    block.__dict__.pop("forward", None)
            for inside, name, value in put:
                inside[name] = value

    def _forward(self, group: int, path: str, block: nn.Module, forward: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            parts = [part for name, part in block.named_modules() if name]
            if path in self.called or any(map(is_changed, parts)) or block._forward_hooks or block._forward_pre_hooks:
                self._doubt(f"`{path}` is called twice, or somebody listens to its modules")
            self.called.add(path)
            leaves, spec = pytree.tree_flatten((arguments, keywords))
            key = (group, str(spec), tuple(map(self._shown, leaves)), _same_places(leaves), *_modes())
            if key not in self.kinds:
                return self._capture(key, path, block, forward, leaves, spec)
            kind = self.kinds[key]
            like = [value for value in kind.outputs if isinstance(value, Tensor)]
            number = list(self.kinds).index(key)
            given = [value for value in leaves if isinstance(value, Tensor)]
            results = iter(call_block(given, like, number, len(self.calls)))
            self.calls.append(path)
            found = [next(results) if isinstance(value, Tensor) else value for value in kind.outputs]
            assert kind.spec is not None
            return pytree.tree_unflatten(found, kind.spec)

        return call

    def _capture(
        self, key: Key, path: str, block: nn.Module, forward: Any, leaves: list[Any], spec: pytree.TreeSpec
    ) -> Any:
        number = len(self.kinds)
        kind = self.kinds[key] = _Kind(path)
        before = fields(block)
        entered: dict[int, Tensor] = {}
        for place, value in enumerate(value for value in leaves if isinstance(value, Tensor)):
            entered.setdefault(id(value), enter_block(value, number, place))
        given = [entered.get(id(value), value) for value in leaves]
        arguments, keywords = pytree.tree_unflatten(given, spec)
        outputs, kind.spec = pytree.tree_flatten(forward(*arguments, **keywords))
        after, after_spec = pytree.tree_flatten((arguments, keywords))
        if fields(block) != before or after_spec != spec or any(map(_differ, given, after)):
            self._doubt(f"`{path}` leaves something behind besides what it returns")
        place = 0
        for value in outputs:
            self._shown(value)
            kind.outputs.append(leave_block(value, number, place) if isinstance(value, Tensor) else value)
            place += isinstance(value, Tensor)
        return pytree.tree_unflatten(kind.outputs, kind.spec)

    def _shown(self, value: Any) -> Any:
        """All that a block can see of an argument, but for a tensor's contents."""
        if isinstance(value, Tensor):
            kind = (type(value), value.dtype, value.device, value.requires_grad)
            return (*kind, *map(str, value.shape), "strides", *map(str, value.stride()))
        if isinstance(value, SymInt):
            return (SymInt, str(value.node.expr))
        if not immutable(value):
            self._doubt(f"a block is given a {type(value).__name__}")
        return (type(value), value)

    def _doubt(self, reason: str) -> None:
        self.doubt = self.doubt or reason
        raise NotAlike(reason)

    # --- afterwards ---

    def write_out(self, module: fx.GraphModule) -> None:
        """Put the operations of the captured block where each call stands, in place, over the block's own tensors."""
        graph = module.graph
        kinds = [_Region(graph, number, kind.path) for number, kind in enumerate(self.kinds.values())]
        for node in list(graph.nodes):
            if node.target is torch.ops.surgery.call_block.default:
                inputs, _, kind, number = node.args
                kinds[kind].copy(node, inputs, self.calls[number])
        for node in reversed(graph.nodes):
            if node.target in _MARKS:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        graph.lint()
        module.recompile()


_MARKS = (torch.ops.surgery.enter_block.default, torch.ops.surgery.leave_block.default)


class _Region:
    """The nodes of a captured block, in order, with what enters and leaves them."""

    def __init__(self, graph: fx.Graph, kind: int, path: str) -> None:
        self.graph, self.path = graph, path
        self.entered: dict[fx.Node, int] = {}
        self.left: dict[int, fx.Node] = {}
        self.nodes: list[fx.Node] = []
        for node in graph.nodes:
            if node.target in _MARKS and node.args[1] == kind:
                if node.target is _MARKS[0]:
                    self.entered[node] = node.args[2]
                else:
                    self.left[node.args[2]] = node.args[0]
            elif self._is_inside(node):
                self.nodes.append(node)
        self._check()

    def _is_inside(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return self._own(str(node.target)) and not is_constant(str(node.target))
        return any(self._own(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values())

    def _own(self, path: str) -> bool:
        return path == self.path or path.startswith(f"{self.path}.")

    def _check(self) -> None:
        """NotAlike where the block reads or writes what is neither its own nor an argument."""
        inside = set(self.nodes)
        for node in self.nodes:
            for source in node.all_input_nodes:
                value = source.meta.get("val")
                known = source in inside or source in self.entered or not isinstance(value, Tensor)
                if not known and not (source.op == "get_attr" and is_constant(str(source.target))):
                    raise NotAlike(f"`{self.path}` reads {source}, which is not among its arguments")
            if writes(node) and not (node.args and node.args[0] in inside):
                raise NotAlike(f"`{self.path}` writes into what it is given")

    def copy(self, call: fx.Node, inputs: list[fx.Node], path: str) -> None:
        """These nodes in place of a call, for the block at `path`."""
        twin: dict[fx.Node, fx.Node] = {node: inputs[place] for node, place in self.entered.items()}
        with self.graph.inserting_before(call):
            for node in self.nodes:
                twin[node] = self.graph.node_copy(node, lambda source: twin.get(source, source))
                twin[node].meta = self._meta(node, path)
                if node.op == "get_attr":
                    twin[node].target = path + str(node.target).removeprefix(self.path)
        for result in list(call.users):
            value = self.left[cast(int, result.args[1])]
            result.replace_all_uses_with(twin.get(value, value))
            self.graph.erase_node(result)
        self.graph.erase_node(call)

    def _meta(self, node: fx.Node, path: str) -> dict[str, Any]:
        stack = {
            key.replace(self.path, path): ((path + place.removeprefix(self.path)) if self._own(place) else place, owner)
            for key, (place, owner) in node.meta["nn_module_stack"].items()
        }
        return {**node.meta, "nn_module_stack": stack}


def _differ(one: Any, other: Any) -> bool:
    return one is not other and (isinstance(one, Tensor) or type(one) is not type(other) or bool(one != other))


def _same_places(leaves: list[Any]) -> tuple[int, ...]:
    """For each tensor, where the same one stood first."""
    tensors = [id(value) for value in leaves if isinstance(value, Tensor)]
    return tuple(tensors.index(one) for one in tensors)


def _modes() -> tuple[Any, ...]:
    """What else operations depend on."""
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
            *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")))  # fmt: skip
