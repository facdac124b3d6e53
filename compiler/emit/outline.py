"""Split a captured graph into what stands outside its repeated blocks and the blocks themselves.

A block is an entry of a repeated ModuleList (`model.layers.3`); its nodes are those that ran inside that module. The
order of the result is valid, and operations that draw random numbers or write into tensors keep the order they had.
Where a stack of blocks does not allow that, its nodes stay outside any block: the computation is always the same.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from surgery.compiler.graph import HANDED_ON

# A value that is computed with one of these is a block's own work, never a shared preparation to be moved out of it.
_HEAVY = re.compile(r"aten\.(linear|addmm|mm|bmm|matmul|baddbmm|conv\w*|scaled_dot_product_attention|layer_norm)\.")
# as an adapted site calls them
_HEAVY_FUNCTIONS = (
    "linear", "matmul", "addmm", "added_linear", "low_rank_linear", "packed_attention", "quantized_linear",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One entry of the ModuleList at `stack`; `inputs` come from outside, `outputs` are read outside.

    What it hands on for `previous` stands last among the outputs, also where no later block is there to read it.
    """

    stack: str
    index: int
    class_name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def path(self) -> str:
        """The block's module path."""
        return f"{self.stack}.{self.index}"


Item = fx.Node | Block


def module_path(node: fx.Node) -> str:
    """The path of the innermost module in which a node ran; empty if it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(path) for path, _ in reversed(stack.values())), "")
    return "" if path.startswith("_") else path


def list_entry(node: fx.Node) -> str:
    """The path of the innermost entry of a list of modules in which a node ran: `model.layers.3`."""
    parts = module_path(node).split(".")
    while parts and not parts[-1].isdecimal():
        parts.pop()
    return ".".join(parts)


def is_ordered(node: fx.Node) -> bool:
    """Whether a node draws random numbers or writes into a tensor, so that it must keep its place among such nodes."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in target.tags:
            return True
        return target._schema.is_mutable and not _writes_into_its_own(node, target)
    if isinstance(target, str):  # a method or a submodule
        return node.op == "call_module" or (target.endswith("_") and not target.endswith("__"))
    return isinstance(target, torch._ops.HigherOrderOperator) or draws_by_name(target)


def draws_by_name(function: object) -> bool:
    """Whether a function that carries no tag of torch's, such as functional.dropout, draws random numbers."""
    name = str(getattr(function, "__name__", ""))
    return any(word in name for word in ("dropout", "rand", "bernoulli"))


def _writes_into_its_own(node: fx.Node, target: torch._ops.OpOverload) -> bool:
    """Whether all that is written was made by an operation just for this one: `(a * b).add_(c)`."""
    written = [
        node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for position, argument in enumerate(target._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    for value in written:
        if (
            not isinstance(value, fx.Node)
            or not isinstance(value.target, torch._ops.OpOverload)
            or len(value.users) != 1
        ):
            return False
        if any(result.alias_info is not None for result in value.target._schema.returns):
            return False
    return True


def outline(graph: fx.Graph, inline: frozenset[str] = frozenset()) -> list[Item]:
    """The computing nodes of `graph` in a valid order, those of a block gathered, but for the stacks in `inline`."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    while True:
        owner = _hoist(nodes, {node: place for node in nodes if (place := _place(node, inline))})
        order, stuck = _arrange(nodes, owner)
        if not stuck:
            return order
        inline = inline | stuck


_Place = tuple[str, int]


def _place(node: fx.Node, inline: frozenset[str]) -> _Place | None:
    """The outermost list entry that a node ran in, leaving out the stacks that are to stay inline."""
    parts = module_path(node).split(".")
    for position in range(1, len(parts)):
        stack = ".".join(parts[:position])
        if parts[position].isdecimal() and stack not in inline:
            return stack, int(parts[position])
    return None


def _hoist(nodes: list[fx.Node], owner: dict[fx.Node, _Place]) -> dict[fx.Node, _Place]:
    """Take out of a block what other blocks of its stack read, if it is a preparation: T5's position bias."""
    owner = dict(owner)
    for node in nodes:
        place = owner.get(node)
        if place is None or node.meta.get(HANDED_ON):  # an earlier block hands its input on, as it made it
            continue
        readers = {owner[user] for user in node.users if user in owner and owner[user] != place}
        if all(reader[0] != place[0] for reader in readers):
            continue
        cone = _cone(node, owner)
        if cone is not None:
            for member in cone:
                del owner[member]
    return owner


def _cone(node: fx.Node, owner: dict[fx.Node, _Place]) -> set[fx.Node] | None:
    """All that a node needs inside its own block, or None if that is more than a preparation."""
    place, cone, todo = owner[node], {node}, [node]
    while todo:
        member = todo.pop()
        if is_ordered(member) or _is_heavy(member):
            return None
        for needed in member.all_input_nodes:
            if owner.get(needed) == place and needed not in cone:
                cone.add(needed)
                todo.append(needed)
            elif needed in owner and owner[needed][0] == place[0] and owner[needed] != place:
                return None
    return cone


def _is_heavy(node: fx.Node) -> bool:
    return _HEAVY.match(str(node.target)) is not None or getattr(node.target, "__name__", "") in _HEAVY_FUNCTIONS


def _arrange(nodes: list[fx.Node], owner: dict[fx.Node, _Place]) -> tuple[list[Item], frozenset[str]]:
    """Topological order over blocks and single nodes, or nothing and the stacks that cannot be gathered."""
    position = {node: number for number, node in enumerate(nodes)}
    key = {node: owner.get(node, node) for node in nodes}
    spans: dict[str, list[int]] = {}
    for node in nodes:
        if node in owner:
            span = spans.setdefault(owner[node][0], [position[node], position[node]])
            span[1] = position[node]
    priority: dict[_Place, int] = {}
    for node in nodes:
        if node in owner:
            priority.setdefault(owner[node], position[node])
    rank: dict[_Place | fx.Node, float] = {place: float(start) for place, start in priority.items()}
    for node in nodes:
        if node not in owner:
            rank[node] = _rank(node, position[node], spans, owner)

    needs: dict[_Place | fx.Node, set[_Place | fx.Node]] = {item: set() for item in rank}
    feeds: dict[_Place | fx.Node, set[_Place | fx.Node]] = defaultdict(set)
    for node in nodes:
        for needed in node.all_input_nodes:
            if needed in key and key[needed] != key[node]:
                needs[key[node]].add(key[needed])
                feeds[key[needed]].add(key[node])

    first = {item: position[item] if isinstance(item, fx.Node) else priority[item] for item in rank}
    ready = [(rank[item], first[item], number, item) for number, item in enumerate(rank) if not needs[item]]
    heapq.heapify(ready)
    waiting = {item: len(needed) for item, needed in needs.items()}
    order: list[_Place | fx.Node] = []
    while ready:
        item = heapq.heappop(ready)[3]
        order.append(item)
        for reader in feeds[item]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, (rank[reader], first[reader], len(rank) + len(order), reader))
    if len(order) < len(rank):
        done = set(order)
        return [], frozenset(item[0] for item in rank if item not in done and isinstance(item, tuple))

    members: dict[_Place, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        if node in owner:
            members[owner[node]].append(node)
    items: list[Item] = [item if isinstance(item, fx.Node) else _block(item, members[item]) for item in order]
    if not _keeps_order(items, position):
        return [], frozenset(spans)
    return items, frozenset()


def _rank(node: fx.Node, position: int, spans: dict[str, list[int]], owner: dict[fx.Node, _Place]) -> float:
    """Where a single node would like to stand: outside the run of blocks that it lies in, before it if that can be."""
    for stack, (start, end) in spans.items():
        if start < position < end and not is_ordered(node):
            below = _depends_on(node, stack, owner)
            return end + 0.5 if below else start - 0.5
    return float(position)


def _depends_on(node: fx.Node, stack: str, owner: dict[fx.Node, _Place]) -> bool:
    seen, todo = {node}, [node]
    while todo:
        for needed in todo.pop().all_input_nodes:
            if needed in owner and owner[needed][0] == stack:
                return True
            if needed not in seen:
                seen.add(needed)
                todo.append(needed)
    return False


def _block(place: _Place, nodes: list[fx.Node]) -> Block:
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    for node in nodes:
        for needed in node.all_input_nodes:
            if needed not in inside and needed.op != "get_attr":
                inputs[needed] = None
    outputs = [node for node in nodes if any(user not in inside for user in node.users) or node.meta.get(HANDED_ON)]
    outputs.sort(key=lambda node: bool(node.meta.get(HANDED_ON)))
    class_name = _class_name(nodes, f"{place[0]}.{place[1]}")
    return Block(place[0], place[1], class_name, tuple(nodes), tuple(inputs), tuple(outputs))


def _class_name(nodes: list[fx.Node], path: str) -> str:
    for node in nodes:
        for module, kind in (node.meta.get("nn_module_stack") or {}).values():
            if module == path:
                return str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    return "Block"


def _keeps_order(items: list[Item], position: dict[fx.Node, int]) -> bool:
    places = [position[node] for node in _flat(items) if is_ordered(node)]
    return places == sorted(places)


def _flat(items: list[Item]) -> Iterator[fx.Node]:
    for item in items:
        yield from item.nodes if isinstance(item, Block) else (item,)
