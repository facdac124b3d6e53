"""Where comments go: every comment of a text belongs to exactly one node, none is lost.

A comment above a line, or inside it, leads the line. One behind a line trails it; one behind the `{` of a longer block
trails the block's owner; what stands between the last line and the `}` closes the block.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from surgery.compiler import nodes
from surgery.compiler.span import Span

_STRING_OR_COMMENT = re.compile(r'"[^"\\\n]*(?:\\.[^"\\\n]*)*"|#[^\n]*')

Element = TypeVar("Element", bound=nodes.Line)


@dataclass(frozen=True)
class Block:
    """The lines between two braces, with the comments that belong to their owner."""

    span: Span
    elements: tuple[nodes.Line, ...]
    head: str = ""
    closing: tuple[str, ...] = ()


class Comments:
    """The comments of a text that parses, by position."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.places = [match.span() for match in _STRING_OR_COMMENT.finditer(text) if match[0].startswith("#")]
        self.starts = [start for start, _ in self.places]

    def between(self, start: int, end: int) -> list[tuple[int, int]]:
        """Places of the comments that begin in `start:end`."""
        return self.places[bisect_left(self.starts, start) : bisect_left(self.starts, end)]

    def inside(self, start: int, end: int) -> tuple[str, ...]:
        """The comments in `start:end`, for the line that they interrupt."""
        return tuple(self._text(place) for place in self.between(start, end))

    def block(self, span: Span, elements: list[nodes.Line]) -> Block:
        """The block of `span` (from `{` to `}`) with its comments given to its lines."""
        first = elements[0].span.start if elements and elements[0].span else span.end
        places = self.between(span.start, min(first, span.end))
        head = ""
        start = span.start + 1
        if places and "\n" not in self.text[span.start : places[0][0]]:
            head, start = self._text(places[0]), places[0][1]
        given, closing = self.give(elements, start, span.end - 1)
        return Block(span, tuple(given), head, closing if given else closing[closing[:1] == ("",) :])

    def give(
        self, elements: list[Element], start: int, end: int, *, separate: bool = False
    ) -> tuple[list[Element], tuple[str, ...]]:
        """The elements of the container `start:end` with their comments, and the comments behind the last one.

        `separate`: the elements are items, which an empty line separates anyway, so that none is recorded.
        """
        given: list[Element] = []
        position = start
        for element in elements:
            assert element.span is not None
            leading, position = self._behind(given, position, element.span.start)
            if leading[:1] == ("",) and (separate or not given):
                leading = leading[1:]
            given.append(replace(element, comments=leading + element.comments))
            position = element.span.end
        closing, _ = self._behind(given, position, end)
        while closing and closing[-1] == "":
            closing = closing[:-1]
        return given, closing[1:] if separate and closing[:1] == ("",) else closing

    def _behind(self, given: list[Element], start: int, end: int) -> tuple[tuple[str, ...], int]:
        """The comments and empty lines in `start:end`; one on the line where the last element ends is given to it."""
        lines: list[str] = []
        position = start
        for index, place in enumerate(self.between(start, end)):
            if index == 0 and given and "\n" not in self.text[position : place[0]]:
                given[-1] = self._trail(given[-1], self._text(place))
            else:
                if self.text.count("\n", position, place[0]) > 1:
                    lines.append("")
                lines.append(self._text(place))
            position = place[1]
        if self.text.count("\n", position, end) > 1:
            lines.append("")
        return tuple(lines), end

    def _trail(self, element: Element, comment: str) -> Element:
        """The element with a comment behind it; behind the `}` of a longer block it moves to the block's end."""
        assert element.span is not None
        owner: Any = element
        header = element.pattern.span if isinstance(element, nodes.Train) else None
        rest = self.text[header.end if header else element.span.start : element.span.end]
        if "\n" in rest and rest.endswith("}") and hasattr(element, "closing"):
            owner = replace(owner, closing=(*owner.closing, comment))
            return owner  # type: ignore[no-any-return]
        return replace(element, trailing=comment)

    def _text(self, place: tuple[int, int]) -> str:
        return self.text[place[0] : place[1]].rstrip()
