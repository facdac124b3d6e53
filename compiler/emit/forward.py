"""The forward functions of step.py: one per distinct block, and the one that calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.compiler.emit.again import Again
from surgery.compiler.emit.body import Body, wrapped
from surgery.compiler.emit.head import Head, head_of, head_source
from surgery.compiler.emit.loops import Call, Function, Loops, documentation, earlier_name
from surgery.compiler.emit.naming import OF_A_STEP, Names, describe, snake
from surgery.compiler.emit.outline import Block, Item, outline
from surgery.compiler.emit.recompute import recomputed_functions
from surgery.compiler.emit.tidy import tidy
from surgery.compiler.graph import EARLIER, HANDED_ON, TRAINING, Graph, is_constant, tensors

HELPER = '''\
def blocks(weights: Weights, path: str, indices: range) -> list[Weights]:
    """The weights of some blocks of the list at `path`, one dictionary per block, with their names inside the block."""
    found: dict[str, Weights] = {str(index): {} for index in indices}
    for name, tensor in weights.items():
        if name.startswith(f"{path}."):
            index, _, inner = name[len(path) + 1 :].partition(".")
            if index in found:
                found[index][inner] = tensor
    return list(found.values())
'''


@dataclass(frozen=True)
class Forward:
    """Source of all forward functions, and the names of the block functions (each may be compiled on its own)."""

    source: str
    block_functions: tuple[str, ...]
    head: Head | None = None  # where `forward` is cut in `hidden_states` and `head`


def forward_source(
    graph: Graph, autocast: bool = False, again: Again | None = None, apart: bool = False
) -> Forward:  # fmt: skip
    """Python for the forward of a graph: the same operations in the same order as its GraphModule runs them.

    With `autocast` the types in the graph are not those at run time, so that every cast stays. The backward runs the
    blocks of `again` a second time; SURG038 where one of them cannot be. With `apart` the head is a function of its
    own, where there is one.
    """
    module = graph.copy().module
    module_graph = tidy(module, autocast)
    functions = recomputed_functions(module)
    head = head_of(module_graph, tensors(module)) if apart else None
    wanted = again.stacks if again else frozenset()
    inline = again.around if again else frozenset()
    while True:
        items = outline(module_graph, inline)
        if again:
            again.check(module, items)
        writer = _Writer(module_graph, graph.inputs, items, functions, again, head)
        lonely = writer.stacks_without_twins() - wanted
        if not lonely:
            return writer.source()
        # Inside the entries of such a list there may be a list of equal blocks: outline that one instead.
        inline = inline | lonely


class _Writer:
    """Texts of the blocks, then of the function around them."""

    def __init__(
        self, graph: fx.Graph, inputs: Sequence[str], items: list[Item], helpers: Mapping[str, str],
        again: Again | None = None, head: Head | None = None,
    ) -> None:  # fmt: skip
        self.graph, self.inputs, self.items, self.helpers, self.again = graph, inputs, items, helpers, again
        self.head = head if head and set(head.nodes + head.prepared) <= set(items) else None
        self.blocks = [item for item in items if isinstance(item, Block)]
        self.stacks = list(dict.fromkeys(block.stack for block in self.blocks))
        own = {"hidden_states", "head", "head_weights"} if self.head else set()
        self.names = Names(frozenset({*helpers, *own}))
        self.placeholders = {
            node: TRAINING if node.target == TRAINING else self.names.claim(str(node.target))
            for node in graph.nodes
            if node.op == "placeholder"
        }
        self.shared: dict[fx.Node, str] = dict(self.placeholders)  # names that blocks and the forward have in common
        self._name_sizes()
        several = len(self.stacks) > 1
        self.flow = {
            stack: self.names.claim(f"{snake(stack.split('.')[0])}_hidden" if several else "hidden")
            for stack in self.stacks
        }
        self.functions: dict[tuple[str, str], Function] = {}
        self.written = [self._write_block(block) for block in self.blocks]
        self._name_functions()
        self.call_of = {block.path: call for block, call in zip(self.blocks, self.written, strict=True)}

    def stacks_without_twins(self) -> frozenset[str]:
        """Stacks whose blocks all differ: functions for them would hide the text, not shorten it."""
        lonely = set(self.stacks)
        for function in self.functions.values():
            if len(function.blocks) > 1:
                lonely -= {block.stack for block in function.blocks}
        return frozenset(lonely)

    def source(self) -> Forward:
        """The text of all functions."""
        parts = [function.text.replace("NAME", function.name, 1) for function in self.functions.values()]
        around = self._write_around()
        helper = [HELPER] if "in blocks(" in around or "blocks(weights" in around else []
        names = tuple(function.name for function in self.functions.values())
        return Forward("\n\n".join([*helper, *self.helpers.values(), *parts, around]), names, self.head)

    # --- names ---

    def _name_sizes(self) -> None:
        lengths = 0
        for node in self.graph.nodes:
            if node.target is not torch.ops.aten.sym_size.int or node.args[0] not in self.placeholders:
                continue
            source, axis = node.args
            assert isinstance(source, fx.Node)
            first = snake(str(source.target)).split("_")[0]
            if axis == 0:
                self.shared[node] = (
                    "batch" if "batch" not in self.shared.values() else self.names.claim(f"{first}_batch")
                )
            elif axis == 1 and source.meta["val"].ndim == 2:
                lengths += 1
                self.shared[node] = "length" if lengths == 1 else self.names.claim(f"{first}_length")

    def _is_carried(self, node: fx.Node, block: Block) -> bool:
        """Whether a block's input flows from block to block, rather than being read by all of them."""
        value = node.meta.get("val")
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            return False
        made = any(node in other.outputs for other in self.blocks if other.stack == block.stack)
        return made or not (self._is_read_by_all(node, block.stack) or describe(node) == "mask")

    def _is_read_by_all(self, node: fx.Node, stack: str) -> bool:
        return all(node in block.inputs for block in self.blocks if block.stack == stack)

    def _shared_name(self, node: fx.Node) -> str:
        if node not in self.shared:
            self.shared[node] = self.names.claim(describe(node))
        return self.shared[node]

    # --- blocks ---

    def _write_block(self, block: Block) -> Call:
        names = Names(frozenset(self.names.used))
        known: dict[fx.Node, str] = {}
        carried = self._carried(block)
        for number, node in enumerate(carried):
            name = "x_earlier" if number and node.meta.get(HANDED_ON) else self.flow[block.stack]
            known[node] = Names.next_of(name, known.values())
            names.used.add(known[node])
        others = [node for node in block.inputs if node not in carried]
        for node in others:
            shared = self._shared_name(node)
            if node not in self.placeholders and not self._is_read_by_all(node, block.stack):
                shared = Names.next_of(describe(node), known.values())  # each block has its own, under one name
            known[node] = shared
            names.used.add(known[node])
        outside: dict[str, str] = {}  # weights of other modules: passed by the caller
        earlier = _of_earlier_blocks(block)
        distances = tuple(sorted({back for back, _ in earlier.values()}))
        names.used.update(earlier_name(back) for back in distances)

        def weight(target: str) -> str:
            if target in earlier:
                back, inner = earlier[target]
                return f'{earlier_name(back)}["{inner}"]'
            if target.startswith(block.path + ".") and not is_constant(target):
                return f'w["{target[len(block.path) + 1 :]}"]'
            if target not in outside:
                short = "constant" if is_constant(target) else snake("_".join(target.split(".")[-2:]))
                outside[target] = names.claim(short)
            return outside[target]

        body = Body(known, weight, names, set(block.outputs), within=block.path)
        body.write(block.nodes)
        order = sorted(others, key=lambda node: (self.shared[node] == TRAINING, _kind(node) != "Tensor"))
        parameters = [
            "w: Weights",
            *(f"{earlier_name(back)}: Weights" for back in distances),
            *(f"{known[node]}: Tensor" for node in carried),
            *(f"{name}: Tensor" for name in outside.values()),
        ]
        parameters += [f"{known[node]}: {_kind(node)}" for node in order]
        if body.uses_device:
            parameters.append("device: torch.device")
        results = [known[node] for node in block.outputs]
        returned = "Tensor" if len(results) == 1 else "tuple[" + ", ".join(["Tensor"] * len(results)) + "]"
        head = wrapped(f"def NAME({', '.join(parameters)})", "")
        head[-1] += f" -> {returned}:"
        lines = [
            *head,
            "    DOCUMENTATION",
            *(f"    {line}" for line in body.lines),
            f"    return {', '.join(results)}",
        ]
        text = "\n".join(lines) + "\n"
        function = self.functions.setdefault((block.class_name, text), Function(text, block.class_name))
        function.blocks.append(block)
        passed: list[fx.Node | str] = [f'weights["{name}"]' for name in outside]
        passed += [*order, *(["device"] if body.uses_device else [])]
        checkpoint = self.again.call(block) if self.again else None
        return Call(block, function, carried, tuple(passed), distances, checkpoint)

    def _carried(self, block: Block) -> tuple[fx.Node, ...]:
        """What flows into a block: the results of the block before it in their order, then those of earlier ones."""
        made = {
            node: (block.index - other.index, position)
            for other in self.blocks
            if other.stack == block.stack
            for position, node in enumerate(other.outputs)
        }
        flowing = [node for node in block.inputs if self._is_carried(node, block)]
        if not any(node.meta.get(HANDED_ON) for node in flowing):
            return tuple(flowing)
        return tuple(sorted(flowing, key=lambda node: made.get(node, (block.index + 1, 0))))

    def _name_functions(self) -> None:
        alike: dict[str, list[Function]] = {}
        for function in self.functions.values():
            stack = function.blocks[0].stack
            same = {
                other.blocks[0].stack for other in self.functions.values() if other.class_name == function.class_name
            }
            prefix = f"{stack.split('.')[0]}_" if len(same) > 1 else ""
            alike.setdefault(snake(prefix + snake(function.class_name)), []).append(function)
        names = Names(OF_A_STEP | self.names.used)
        for stem, functions in alike.items():
            for function in functions:
                first = function.blocks[0]
                function.name = names.claim(stem if len(functions) == 1 else f"{stem}_{first.index}")
                function.text = function.text.replace("DOCUMENTATION", f'"""{documentation(function.blocks)}"""', 1)

    # --- the function around them ---

    def _write_around(self) -> str:
        output = next(node for node in self.graph.nodes if node.op == "output")
        self.known: dict[fx.Node, str] = dict(self.placeholders)
        wanted = dict(self.shared)
        for call in self.written:
            start = call.carried[0] if call.carried else None
            # The value that enters the first block takes the name that the loop goes on with, unless others read it.
            if start is not None and start not in wanted and all(user in call.block.nodes for user in start.users):
                wanted[start] = self.flow[call.block.stack]
        kept = {node for block in self.blocks for node in block.inputs}
        apart = set[Item]()
        if self.head:
            kept, apart = kept | {self.head.hidden}, {*self.head.nodes, *self.head.prepared}
        body = Body(self.known, lambda name: f'weights["{name}"]', self.names, kept)
        position, uses_device = 0, any("device" in call.passed for call in self.written)
        while position < len(self.items):
            end = position
            if isinstance(self.items[position], Block):
                stack = self.items[position].stack  # type: ignore[union-attr]
                while end < len(self.items) and isinstance(self.items[end], Block) and self.items[end].stack == stack:  # type: ignore[union-attr]
                    end += 1
                calls = [self.call_of[item.path] for item in self.items[position:end] if isinstance(item, Block)]
                body.lines += ["", *Loops(self.known, self.flow[stack], self.names).write(calls), ""]
            else:
                while end < len(self.items) and isinstance(self.items[end], fx.Node):
                    end += 1
                nodes = [item for item in self.items[position:end] if isinstance(item, fx.Node) and item not in apart]
                body.write(nodes, wanted)
            position = end
        value = self.head.hidden if self.head else output.args[0]
        result = literal_output(value, body)
        parameters = ["weights: Weights", *(f"{self.placeholders[node]}: {_kind(node)}" for node in self.placeholders)]
        listed = ", ".join(parameters).replace(f"{TRAINING}: bool", f"{TRAINING}: bool = True")
        name = "hidden_states" if self.head else "forward"
        what = "what its head reads" if self.head else "its outputs"
        heading = wrapped(f"def {name}({listed})")
        heading[-1] += " -> Tensor:" if isinstance(value, fx.Node) else " -> Any:"
        lines = [
            *heading,
            f'    """The adapted model: {what}, from inputs [batch, ...]; dropout is live while `training`."""',
        ]
        first = next(iter(self.placeholders.values()))
        if uses_device or body.uses_device:
            lines.append(f"    device = {first}.device")
        body.lines = _without_blank_ends(body.lines)
        lines += [f"    {line}" if line else "" for line in body.lines]
        text = "\n".join([*lines, f"    return {result}"]) + "\n"
        return f"{text}\n\n{self._write_head(self.head, listed)}" if self.head else text

    def _write_head(self, head: Head, parameters: str) -> str:
        """The functions of the head, and the whole."""
        heading = wrapped(f"def forward({parameters})")
        more = f", {TRAINING}" if head.training else ""
        lines = [
            *heading[:-1],
            f"{heading[-1]} -> Tensor:",
            '    """The adapted model: its logits, from inputs [batch, ...]; dropout is live while `training`."""',
            f"    hidden = hidden_states(weights, {', '.join(self.placeholders.values())})",
            f"    return head(head_weights(weights), hidden{more})",
        ]
        return f"{head_source(head)}\n\n" + "\n".join(lines) + "\n"


def literal_output(value: Any, body: Body) -> str:
    """The text of a graph's output: a node, or a nested list of nodes and constants."""
    if isinstance(value, fx.Node):
        return body.text(value).source
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(literal_output(entry, body) for entry in value) + "]"
    return repr(value)


def _without_blank_ends(lines: list[str]) -> list[str]:
    while lines and not lines[0]:
        lines = lines[1:]
    while lines and not lines[-1]:
        lines = lines[:-1]
    return [line for number, line in enumerate(lines) if line or lines[number - 1]]


def _kind(node: fx.Node) -> str:
    value = node.meta.get("val")
    if node.op == "placeholder" and node.target == TRAINING:
        return "bool"
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return "int"
    return "float" if isinstance(value, (float, torch.SymFloat)) else "Tensor"


def _of_earlier_blocks(block: Block) -> dict[str, tuple[int, str]]:
    """The weights of earlier blocks of its list that a block reads: how many blocks earlier, and their names there."""
    found: dict[str, tuple[int, str]] = {}
    for node in block.nodes:
        for read in node.all_input_nodes:
            target = str(read.target)
            if read.op == "get_attr" and read.meta.get(EARLIER) and target.startswith(f"{block.stack}."):
                index, _, inner = target[len(block.stack) + 1 :].partition(".")
                if int(index) != block.index:
                    found[target] = (block.index - int(index), inner)
    return found
