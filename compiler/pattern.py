"""Path patterns: `encoder.layer.*.attention.self.{query,value}`, `**.mlp`, `model.layers.[8..15].self_attn.q_proj`.

`*` stands for any run within a component (or a whole one), `**` for any number of components, `{a,b}` for alternatives,
`[8..15]` for an index between both ends. Matching is a set of positions walked over the text: linear, no backtracking.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from surgery.compiler import nodes
from surgery.compiler.diagnostics import fail


@dataclass(frozen=True)
class Text:
    """Literal characters."""

    text: str


@dataclass(frozen=True)
class Star:
    """`*`: any run of characters without a dot."""


@dataclass(frozen=True)
class Components:
    """`**`: any number of components, with the dot behind them unless it ends the pattern."""

    last: bool


@dataclass(frozen=True)
class Alternatives:
    """`{a,b}`; every option is a sequence of its own, and must match something."""

    options: tuple[tuple[Part, ...], ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Index:
    """`[first..last]` or `[n]`, both ends included."""

    first: int
    last: int


Part = Text | Star | Components | Alternatives | Index
TOKEN = re.compile(
    r"(?P<components>\*\*\.?)|(?P<star>\*)|\{(?P<options>[^{}]*)\}|\[(?P<index>[^\[\]]*)\]|(?P<text>[^*{}\[\]]+)"
)
INDEX = re.compile(r"\s*(\d{1,9})\s*(?:\.\.\s*(\d{1,9})\s*)?")


def parse_pattern(node: nodes.Pattern) -> tuple[Part, ...]:
    """The parts of a pattern; raises `SurgError` (SURG004) where it makes no sense."""
    return tuple(_parts(node.text, node))


def _parts(text: str, node: nodes.Pattern) -> Iterator[Part]:
    position = 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise fail("SURG004", f"`{text[position:]}` is no part of a pattern", node.span)
        position = match.end()
        if match["components"]:
            before = text[: match.start()]
            if (before and not before.endswith(".")) or (
                position < len(text) and not match["components"].endswith(".")
            ):
                raise fail("SURG004", "`**` stands for whole components: `**.name` or `name.**`", node.span)
            yield Components(position == len(text) and not match["components"].endswith("."))
        elif match["star"]:
            yield Star()
        elif match["options"] is not None:
            texts = tuple(option.strip() for option in match["options"].split(",") if option.strip())
            if not texts:
                raise fail("SURG004", "alternatives are empty", node.span)
            yield Alternatives(tuple(tuple(_parts(option, node)) for option in texts), texts)
        elif match["index"] is not None:
            bounds = INDEX.fullmatch(match["index"])
            first = int(bounds[1]) if bounds else 1
            last = int(bounds[2] or bounds[1]) if bounds else 0
            if first > last:
                raise fail("SURG004", f"`[{match['index']}]` is no range of indices, such as `[8..15]`", node.span)
            yield Index(first, last)
        else:
            yield Text(match["text"])


def _ends(parts: tuple[Part, ...], path: str, starts: set[int]) -> set[int]:
    for part in parts:
        starts = {end for start in starts for end in _part_ends(part, path, start)}
        if not starts:
            break
    return starts


def _part_ends(part: Part, path: str, start: int) -> Iterable[int]:
    match part:
        case Text(text):
            return (start + len(text),) if path.startswith(text, start) else ()
        case Star():
            dot = path.find(".", start)
            return range(start, (len(path) if dot < 0 else dot) + 1)
        case Components(last):
            if last:
                return (len(path),)
            return [start, *(position + 1 for position in range(start, len(path)) if path[position] == ".")]
        case Alternatives(options):
            return set[int]().union(*(_ends(option, path, {start}) for option in options))
        case Index(first, last):
            digits = re.compile(r"\d+").match(path, start)
            return (digits.end(),) if digits and first <= int(digits[0]) <= last else ()


def matches(parts: tuple[Part, ...], path: str) -> bool:
    """Whether a module or parameter path fits a pattern; `a.**` fits `a` itself."""
    if parts and isinstance(parts[-1], Components) and parts[-1].last and len(parts) > 1:
        head = parts[:-1]
        if isinstance(head[-1], Text) and head[-1].text.endswith("."):
            own = (*head[:-1], Text(head[-1].text[:-1])) if head[-1].text != "." else head[:-1]
            if len(path) in _ends(own, path, {0}):
                return True
    return len(path) in _ends(parts, path, {0})


def unmatched(parts: tuple[Part, ...], paths: list[str]) -> list[str]:
    """The alternatives and indices of a pattern that match none of the paths, as they are spelt."""
    missing = []
    for position, part in enumerate(parts):
        if isinstance(part, Alternatives):
            for option, text in zip(part.options, part.texts, strict=True):
                if not any(matches((*parts[:position], *option, *parts[position + 1 :]), path) for path in paths):
                    missing.append(text)
        if isinstance(part, Index):
            present = sorted(
                {
                    int(digits)
                    for path in paths
                    if matches(parts, path)
                    for end in _ends(parts[:position], path, {0})
                    for digits in re.compile(r"\d+").findall(path[end : end + 9])[:1]
                }
            )
            wanted = range(part.first, part.last + 1)
            gap = (
                next((index for index in wanted if index not in present), None) if len(present) < len(wanted) else None
            )
            if gap is not None:
                missing.append(f"[{gap}]" if gap == part.last else f"[{gap}..{part.last}]")
    return missing


def ancestry(path: str) -> list[str]:
    """A path, and those of all modules around it, the longest first."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def parent_patterns(text: str) -> Iterator[str]:
    """The pattern without its last components, longest first: to say how far it does match."""
    depth = 0
    for position in range(len(text) - 1, 0, -1):
        depth += {"}": 1, "]": 1, "{": -1, "[": -1}.get(text[position], 0)
        if text[position] == "." and depth == 0:
            yield text[:position]
