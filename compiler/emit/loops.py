"""Calls of block functions: one loop for blocks that are called alike, however many they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from surgery.compiler.emit.body import WIDTH, wrapped
from surgery.compiler.emit.naming import Names
from surgery.compiler.emit.outline import Block
from surgery.compiler.graph import HANDED_ON


@dataclass
class Function:
    """A block function: its text, with NAME for its name, the class that it runs, and the blocks that share it."""

    text: str
    class_name: str
    blocks: list[Block] = field(default_factory=list)
    name: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A block that the backward runs again: whether it `draws` random numbers, and what to say of it."""

    draws: bool
    comment: str


@dataclass(frozen=True)
class Call:
    """How a block is called: `carried` are values that blocks hand on, `passed` is the rest, in order.

    `earlier` says of which blocks before it the weights are passed too: 1 is the one before.
    """

    block: Block
    function: Function
    carried: tuple[fx.Node, ...]
    passed: tuple[fx.Node | str, ...]
    earlier: tuple[int, ...] = ()
    checkpoint: Checkpoint | None = None

    def text(self, arguments: Sequence[str]) -> str:
        """The call itself."""
        given = ", ".join(part for part in arguments if part)
        if self.checkpoint is None:
            return f"{self.function.name}({given})"
        options = f"use_reentrant=False, preserve_rng_state={self.checkpoint.draws}"
        return f"checkpoint({self.function.name}, {given}, {options})"


def documentation(blocks: Sequence[Block]) -> str:
    """Which blocks a function runs, in words that do not grow with their number."""
    parts = []
    for stack in dict.fromkeys(block.stack for block in blocks):
        parts.append(f"{stack}.{spans([block.index for block in blocks if block.stack == stack])}")
    return f"One block: {' and '.join(parts)}."


def spans(numbers: Sequence[int]) -> str:
    """`0..15`, `0, 2, ..., 24` or the numbers themselves."""
    if len(numbers) == 1:
        return str(numbers[0])
    steps = {after - before for before, after in zip(numbers, numbers[1:], strict=False)}
    if steps == {1}:
        return f"{numbers[0]}..{numbers[-1]}"
    if len(steps) == 1 and len(numbers) > 3:
        return f"({numbers[0]}, {numbers[1]}, ..., {numbers[-1]})"
    return "(" + ", ".join(map(str, numbers)) + ")"


Origin = tuple[bool, int]  # of a carried value: whether the block before made it, and its place there


def earlier_name(back: int) -> str:
    """What holds the weights of the block so many blocks earlier."""
    return f"earlier_{back}"


class Loops:
    """Writes the calls of consecutive blocks of one stack; `known` gets the names of what they return."""

    def __init__(self, known: dict[fx.Node, str], flow: str, names: Names) -> None:
        self.known, self.flow, self.names = known, flow, names
        self.done: set[fx.Node] = set()  # what is written already

    def write(self, calls: Sequence[Call]) -> list[str]:
        """A loop where what each block is given comes from the one before it, else one call after the other."""
        lines: list[str] = []
        start = 0
        while start < len(calls):
            end = self._end(calls, start)
            lines += self._loop(calls[start:end]) if end - start > 1 else self._single(calls[start])
            self.done |= {node for call in calls[start:end] for node in call.block.nodes}
            start = end
        return lines

    def _end(self, calls: Sequence[Call], start: int) -> int:
        """Where the run of calls ends that one loop can make."""
        end, origins = start + 1, None
        while end < len(calls):
            found = _origins(calls[end - 1], calls[end])
            if found is None or (origins is not None and found != origins):
                break
            origins, end = found, end + 1
        for number in range(start, end - 1):  # nothing of a block inside may be read behind the loop
            inside = {node for call in calls[number:end] for node in call.block.nodes}
            if any(user not in inside for node in calls[number].block.outputs for user in node.users):
                return number + 1
        return end

    def _is_free(self, call: Call) -> bool:
        """Whether the stream's name may go on to a result: it is unused, or what flows in and is not read again."""
        holders = [node for node, name in self.known.items() if name == self.flow]
        if not holders:
            return True
        return holders[-1] in call.carried[:1] and all(user in call.block.nodes for user in holders[-1].users)

    def _values(self, call: Call) -> str:
        return ", ".join(part if isinstance(part, str) else self.known[part] for part in call.passed)

    def _stem(self, number: int, node: fx.Node) -> str:
        return "x_earlier" if number and node.meta.get(HANDED_ON) else self.flow

    def _single(self, call: Call) -> list[str]:
        results: list[str] = []
        free = self._is_free(call)
        for number, node in enumerate(call.block.outputs):
            results.append(self.flow if free and number == 0 else self.names.claim(self._stem(number, node)))
        carried = [self.known[node] for node in call.carried]
        index = call.block.index
        weights = [_entries(call.block.stack, index - back, index - back + 1) + "[0]" for back in (0, *call.earlier)]
        statement = f"{', '.join(results)} = {call.text((*weights, *carried, self._values(call)))}"
        self.known.update(zip(call.block.outputs, results, strict=True))
        return [*_said([call]), *wrapped(statement)]

    def _loop(self, calls: Sequence[Call]) -> list[str]:
        first, last = calls[0], calls[-1]
        origins = _origins(first, calls[1])
        assert origins is not None
        read = self.done | {node for call in calls for node in call.block.nodes}
        state = [self.flow if self._is_free(first) else self.names.claim(self.flow)]
        for number, node in enumerate(first.carried[1:], 1):
            keeps = node.meta.get(HANDED_ON) and all(user in read for user in node.users)
            state.append(self.known[node] if keeps else self.names.claim(self._stem(number, node)))
        lines = _said(calls)
        for name, node in zip(state, first.carried, strict=True):
            if self.known[node] != name:
                lines.append(f"{name} = {self.known[node]}")
        results, moved = self._results(last, state, origins)
        for name, (made, place) in zip(state, origins, strict=True):
            self.known[(last.block.outputs if made else last.carried)[place]] = name
        for name, node in zip(results, last.block.outputs, strict=True):
            self.known.setdefault(node, name)
        targets = ", ".join(("w", *map(earlier_name, first.earlier)))
        ranges = [
            _entries(first.block.stack, first.block.index - back, last.block.index + 1 - back)
            for back in (0, *first.earlier)
        ]
        entries = f"zip({', '.join(ranges)})" if len(ranges) > 1 else ranges[0]
        texts: dict[str, list[int]] = {}
        for call in calls:
            text = f"{', '.join(results)} = {call.text((targets, *state, self._values(call)))}"
            texts.setdefault(text, []).append(call.block.index - first.block.index)
        if len(texts) == 1:
            return [*lines, *_headed(f"for {targets} in {entries}"), *_indented(wrapped(next(iter(texts))), 1),
                    *_indented(moved, 1)]  # fmt: skip
        targets = f"({targets})" if first.earlier else targets
        lines += _headed(f"for index, {targets} in enumerate({entries})")
        for number, (text, members) in enumerate(texts.items()):
            word = "if" if number == 0 else "elif"
            condition = "else:" if number == len(texts) - 1 else f"{word} {_condition(members, len(calls))}:"
            lines += [f"    {condition}", *_indented(wrapped(text), 2)]
        return [*lines, *_indented(moved, 1)]

    def _results(self, call: Call, state: Sequence[str], origins: Sequence[Origin]) -> tuple[list[str], list[str]]:
        """The names of a call's results in a loop, and the statement that moves values on to where the next reads them.

        A result goes straight into its place, unless what stands there is itself to be moved.
        """
        taken = {place for made, place in origins if not made}
        places = {place: number for number, (made, place) in enumerate(origins) if made}
        results = []
        for number, node in enumerate(call.block.outputs):
            place = places.get(number)
            straight = place is not None and place not in taken
            results.append(state[place] if straight and place is not None else self.names.claim(self._stem(1, node)))
        sources = [results[place] if made else state[place] for made, place in origins]
        moves = [(name, source) for name, source in zip(state, sources, strict=True) if name != source]
        if not moves:
            return results, []
        return results, [f"{', '.join(name for name, _ in moves)} = {', '.join(source for _, source in moves)}"]


def _said(calls: Sequence[Call]) -> list[str]:
    return list(dict.fromkeys(f"# {call.checkpoint.comment}" for call in calls if call.checkpoint is not None))


def _origins(before: Call, after: Call) -> tuple[Origin, ...] | None:
    """Where a block's carried values come from, if all are made by the block before it or given to that one."""
    if after.block.index != before.block.index + 1 or after.earlier != before.earlier:
        return None
    if len(before.carried) != len(after.carried):
        return None
    origins: list[Origin] = []
    for node in after.carried:
        for made, nodes in ((True, before.block.outputs), (False, before.carried)):
            if node in nodes:
                origins.append((made, nodes.index(node)))
                break
        else:
            return None
    return tuple(origins)


def _entries(stack: str, start: int, stop: int) -> str:
    indices = f"range({stop})" if start == 0 and stop != 1 else f"range({start}, {stop})"
    return f'blocks(weights, "{stack}", {indices})'


def _headed(statement: str) -> list[str]:
    lines = wrapped(statement) if len(statement) >= WIDTH else [statement]
    return [*lines[:-1], f"{lines[-1]}:"]


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
