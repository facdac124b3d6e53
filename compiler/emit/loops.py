"""Calls of block functions: one loop for blocks that are called alike, however many they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from surgery.compiler.emit.body import wrapped
from surgery.compiler.emit.naming import Names
from surgery.compiler.emit.outline import Block


@dataclass
class Function:
    """A block function: its text, with NAME for its name, the class that it runs, and the blocks that share it."""

    text: str
    class_name: str
    blocks: list[Block] = field(default_factory=list)
    name: str = ""


@dataclass(frozen=True)
class Call:
    """How a block is called: `carried` are values that blocks hand on, `passed` is the rest, in order."""

    block: Block
    function: Function
    carried: tuple[fx.Node, ...]
    passed: tuple[fx.Node | str, ...]


class Loops:
    """Writes the calls of consecutive blocks of one stack; `known` gets the names of what they return."""

    def __init__(self, known: dict[fx.Node, str], flow: str, names: Names) -> None:
        self.known, self.flow, self.names = known, flow, names

    def write(self, calls: Sequence[Call]) -> list[str]:
        """A loop where each block feeds only the next one, else one call after the other."""
        lines: list[str] = []
        start = 0
        while start < len(calls):
            end = start + 1
            while end < len(calls) and self._feeds(calls[end - 1], calls[end]):
                end += 1
            lines += self._loop(calls[start:end]) if end - start > 1 else self._single(calls[start])
            start = end
        return lines

    def _feeds(self, before: Call, after: Call) -> bool:
        """Whether a block's results go to the next one and nowhere else, and the next one carries nothing else."""
        inside = set(after.block.nodes)
        apart = all(
            user in inside for node in before.block.outputs for user in node.users if user not in before.block.nodes
        )
        same_list = after.block.index == before.block.index + 1
        alike = len(before.carried) == len(before.block.outputs)
        return same_list and alike and apart and after.carried == before.block.outputs

    def _is_free(self, call: Call) -> bool:
        """Whether the stream's name may go on to a result: it is unused, or what flows in and is not read again."""
        holders = [node for node, name in self.known.items() if name == self.flow]
        if not holders:
            return True
        return holders[-1] in call.carried[:1] and all(user in call.block.nodes for user in holders[-1].users)

    def _values(self, call: Call) -> str:
        return ", ".join(part if isinstance(part, str) else self.known[part] for part in call.passed)

    def _single(self, call: Call) -> list[str]:
        results: list[str] = []
        free = self._is_free(call)
        for number in range(len(call.block.outputs)):
            results.append(self.flow if free and number == 0 else self.names.claim(self.flow))
        carried = [self.known[node] for node in call.carried]
        index = call.block.index
        weights = f'blocks(weights, "{call.block.stack}", range({index}, {index + 1}))[0]'
        arguments = ", ".join(part for part in (weights, *carried, self._values(call)) if part)
        self.known.update(zip(call.block.outputs, results, strict=True))
        return wrapped(f"{', '.join(results)} = {call.function.name}({arguments})")

    def _loop(self, calls: Sequence[Call]) -> list[str]:
        first, last = calls[0], calls[-1]
        state = [self.flow if self._is_free(first) else self.names.claim(self.flow)]
        while len(state) < len(first.carried):
            state.append(self.names.claim(self.flow))
        lines = []
        for name, node in zip(state, first.carried, strict=True):
            if self.known[node] != name:
                lines.append(f"{name} = {self.known[node]}")
        for name, node in zip(state, last.block.outputs, strict=True):
            self.known[node] = name
        start, stop = first.block.index, last.block.index + 1
        indices = f"range({stop})" if start == 0 else f"range({start}, {stop})"
        entries = f'blocks(weights, "{first.block.stack}", {indices})'
        texts: dict[str, list[int]] = {}
        for call in calls:
            arguments = ", ".join(part for part in ("w", *state, self._values(call)) if part)
            text = f"{', '.join(state)} = {call.function.name}({arguments})"
            texts.setdefault(text, []).append(call.block.index - start)
        if len(texts) == 1:
            return [*lines, f"for w in {entries}:", *_indented(wrapped(next(iter(texts))), 1)]
        lines.append(f"for index, w in enumerate({entries}):")
        for number, (text, members) in enumerate(texts.items()):
            word = "if" if number == 0 else "elif"
            condition = "else:" if number == len(texts) - 1 else f"{word} {_condition(members, len(calls))}:"
            lines += [f"    {condition}", *_indented(wrapped(text), 2)]
        return lines


def _condition(members: Sequence[int], total: int) -> str:
    """Which of `total` blocks: every second one, the first eight, or a list."""
    if len(members) == 1:
        return f"index == {members[0]}"
    steps = {after - before for before, after in zip(members, members[1:], strict=False)}
    step = steps.pop() if len(steps) == 1 else 0
    if step == 1:
        return f"index < {members[-1] + 1}" if members[0] == 0 else f"{members[0]} <= index <= {members[-1]}"
    if step > 1 and members[0] < step and members[-1] + step >= total:
        return f"index % {step} == {members[0]}"
    return f"index in {tuple(members)}"


def _indented(lines: Sequence[str], depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]
