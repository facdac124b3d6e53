"""The statements of one emitted function: nested expressions where they read well, one name per value, comments."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import fx

from surgery.compiler.emit.naming import Names, by_factor, by_operation, is_skip, operation, snake
from surgery.compiler.emit.outline import module_path
from surgery.compiler.emit.spelling import Text, spell
from surgery.compiler.kernels.low_rank import low_rank_linear
from surgery.compiler.span import Span

WIDTH = 112
_NESTED = 84  # longer expressions get a name of their own
_NAMED_LIST = re.compile(r"\w+=\[.*,")
_SHORT = 20  # what is as short as this may stand in any call


class Body:
    """Writes nodes as statements in exactly their order, so that autograd and random numbers see the same sequence.

    `known` names what comes from outside, `weight` spells a `get_attr` target, `kept` are the nodes that are read
    later on and need a name, `within` is the module path that comments and names leave out.
    """

    def __init__(
        self,
        known: dict[fx.Node, str],
        weight: Callable[[str], str],
        names: Names,
        kept: set[fx.Node],
        within: str = "",
    ) -> None:
        self.known, self.weight, self.names, self.kept, self.within = known, weight, names, kept, within
        self.lines: list[str] = []
        self.uses_device = False
        self._pending: list[tuple[fx.Node, Text]] = []
        self._section = ""
        self._place: tuple[str, int] | None = None
        self._modules: dict[str, list[fx.Node]] = {}

    def write(self, nodes: Sequence[fx.Node], wanted: dict[fx.Node, str] | None = None) -> None:
        """Append the statements of `nodes`; `wanted` are names that the caller asks for."""
        wanted = wanted or {}
        self._modules = {}
        for node in nodes:
            if not _gives_several(node):  # its results stand for it
                self._modules.setdefault(module_path(node), []).append(node)
        inside = set(nodes)
        for node in nodes:
            if not (node.target is operator.getitem and _gives_several(node.args[0])):
                self._node(node, inside, wanted)
        self._flush(wanted)

    def text(self, node: fx.Node) -> Text:
        """How a node that has a name, or a weight, is written."""
        return Text(self.weight(str(node.target)) if node.op == "get_attr" else self.known[node])

    def _node(self, node: fx.Node, inside: set[fx.Node], wanted: dict[fx.Node, str]) -> None:
        needed: list[fx.Node] = []

        def record(argument: fx.Node) -> Text:
            if any(argument is waiting for waiting, _ in self._pending):
                needed.append(argument)
                return Text("x")
            return self.text(argument)

        spell(node, record)
        count = self._nestable(node, needed)
        self._flush(wanted, leave=count)
        nested = dict(self._pending)
        text = spell(node, lambda argument: nested[argument] if argument in nested else self.text(argument))
        del self._pending[len(self._pending) - count :]
        if any(isinstance(value, torch.device) for value in (*node.args, *node.kwargs.values())):
            self.uses_device = True
        if self._may_nest(node, inside, wanted) and len(text.source) <= _NESTED:
            self._pending.append((node, text))
            return
        self._flush(wanted)
        self._assign(node, text, wanted)

    def _nestable(self, node: fx.Node, needed: list[fx.Node]) -> int:
        """How many of the waiting expressions may stand inside this one: the last, in the order of its arguments."""
        for count in range(len(needed), 0, -1):
            tail = self._pending[len(self._pending) - count :]
            if [waiting for waiting, _ in tail] != needed[len(needed) - count :]:
                continue
            nested = dict(tail)
            if all(len(text.source) <= _SHORT for text in nested.values()):
                return count
            if len(spell(node, partial(self._provisional, nested)).source) <= _NESTED:
                return count
        return 0

    def _provisional(self, nested: dict[fx.Node, Text], argument: fx.Node) -> Text:
        """The text of an argument before those that will not be nested have their names."""
        if argument in nested:
            return nested[argument]
        return self.text(argument) if argument.op == "get_attr" or argument in self.known else Text("a_name_to_come")

    def _may_nest(self, node: fx.Node, inside: set[fx.Node], wanted: dict[fx.Node, str]) -> bool:
        """Read exactly once, in this body, and not the result of a module, which deserves its name."""
        if node in self.kept or node in wanted or len(node.users) != 1 or self._is_result(node):
            return False
        if _gives_several(node):
            return False
        user = next(iter(node.users))
        uses = sum(argument is node for argument in _flat((user.args, tuple(user.kwargs.values()))))
        telling = operation(node) in ("scaled_dot_product_attention", "getitem") or is_skip(node)
        return user in inside and uses == 1 and not telling

    def _is_result(self, node: fx.Node) -> bool:
        path = module_path(node)
        return len(path) > len(self.within) and self._modules[path][-1] is node and not self._has_children(path)

    def _has_children(self, path: str) -> bool:
        return any(other.startswith(path + ".") for other in self._modules)

    def _flush(self, wanted: dict[fx.Node, str], leave: int = 0) -> None:
        """Give names to the waiting expressions, but for the last `leave`."""
        cut = len(self._pending) - leave
        pending, self._pending = self._pending[:cut], self._pending[cut:]
        for node, text in pending:
            self._assign(node, text, wanted)

    def _assign(self, node: fx.Node, text: Text, wanted: dict[fx.Node, str]) -> None:
        self._comment(node)
        results = _results(node)
        if node.users or node in self.kept:
            for result in filter(None, results):
                self.known[result] = wanted[result] if result in wanted else self.names.claim(self._name(result))
            targets = ["_" if result is None else self.known[result] for result in results]
            left = f"({targets[0]},)" if _gives_several(node) and len(targets) == 1 else ", ".join(targets)
            text = Text(f"{left} = {text.source}")
        self.lines += wrapped(text.source, self._trailing(results))

    def _name(self, node: fx.Node) -> str:
        if self._is_result(node):
            last = [part for part in module_path(node).split(".") if not part.isdecimal()][-1:]
            return snake(last[0]) if last else by_operation(node, None)
        path = [part for part in self._inner(node).split(".") if not part.isdecimal()]
        if isinstance(node.meta.get("span"), Span) and path and path[-1]:
            taken = node.target is operator.getitem and _gives_several(node.args[0])
            return f"{snake(path[-1])}_{'adapted' if taken else by_factor(node) or by_operation(node, None)}"
        first = next((argument for argument in node.args if isinstance(argument, fx.Node)), None)
        while first is not None and first not in self.known and first.op != "get_attr":  # an expression that was nested
            first = next((argument for argument in first.args if isinstance(argument, fx.Node)), None)
        base = None
        if first is not None:
            base = self.known.get(first) or str(first.target).rpartition(".")[2]
        return by_operation(node, base)

    def _inner(self, node: fx.Node) -> str:
        """The path of a node's module below the one that this function is of."""
        path = module_path(node)
        return path[len(self.within) :].lstrip(".") if path.startswith(self.within) else path

    def _comment(self, node: fx.Node) -> None:
        path = self._inner(node)
        nodes = self._modules.get(module_path(node), [])
        section = path if len(nodes) > 1 else path.rpartition(".")[0]
        if not section or section == self._section or self._section.startswith(section + "."):
            return
        self._section = section
        self.lines.append(f"# {section}")

    def _trailing(self, results: Sequence[fx.Node | None]) -> str:
        """Where in the spec the results of one statement come from, said once for a run of nodes from one line."""
        spans = [node.meta.get("span") for node in results if node is not None]
        places = dict.fromkeys((Path(span.file).name, span.line) for span in spans if isinstance(span, Span))
        new = [place for place in places if place != self._place]
        self._place = next(reversed(places), None)
        return ", ".join(f"{file}:{line}" for file, line in new)


def _gives_several(node: object) -> bool:
    """Whether a call gives a list, which is taken apart where it stands."""
    return isinstance(node, fx.Node) and node.target is low_rank_linear


def _results(node: fx.Node) -> list[fx.Node | None]:
    """What a statement gives names to: the node, or the entries of its list, None for one that nobody reads."""
    if not _gives_several(node):
        return [node]
    taken = {user.args[1]: user for user in node.users}
    return [taken.get(number) for number in range(len(node.kwargs["weights"]))]  # type: ignore[arg-type]


def _flat(value: object) -> list[object]:
    if isinstance(value, (list, tuple)):
        return [leaf for entry in value for leaf in _flat(entry)]
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    return [value]


def wrapped(statement: str, comment: str = "") -> list[str]:
    """A statement on one line, or with the arguments of its outermost call on lines of their own.

    Where arguments are lists by name, each argument has a line; what is too long for one is wrapped itself.
    """
    if len(statement) <= WIDTH or not statement.endswith((")", "]")):
        if comment and len(statement) + len(comment) + 4 > WIDTH:
            return [f"# {comment}", statement]
        return [f"{statement}  # {comment}" if comment else statement]
    depth, cuts, start = 0, [], -1
    for position in range(len(statement) - 1, -1, -1):
        character = statement[position]
        if character in ")]":
            depth += 1
        elif character in "([":
            depth -= 1
            if depth == 0:
                start = position
                break
        elif character == "," and depth == 1:
            cuts.append(position)
    bounds = [start, *reversed(cuts), len(statement) - 1]
    parts = [statement[left + 1 : right].strip() for left, right in zip(bounds, bounds[1:], strict=False)]
    lines, row = [statement[: start + 1]], ""
    apart = any(_NAMED_LIST.match(part) for part in parts)
    for part in parts:
        if row and (apart or len(row) + len(part) + 6 > WIDTH):
            lines.append(f"    {row}")
            row = ""
        if len(part) + 6 > WIDTH:
            *inner, last = wrapped(part)
            lines += [f"    {line}" for line in (*inner, f"{last},")]
        else:
            row += (" " if row else "") + part + ","
    if row:
        lines.append(f"    {row.rstrip(',') if len(parts) == 1 else row}")
    end = statement[-1]
    return [*lines, f"{end}  # {comment}" if comment else end]
