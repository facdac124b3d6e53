"""Where reading a text stopped: what stands there, what could have come, and what is still open."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from surgery.compiler.span import Source

ITEMS = ("model", "adapt", "train", "freeze", "step", "data", "method", "use")

# What stands in a text, coarsely: enough to name a token and to match brackets. The last alternative takes anything.
_TOKEN = re.compile(
    r'#[^\n]*|\s+|"[^"\\\n]*(?:\\.[^"\\\n]*)*"|[A-Za-z_][A-Za-z0-9_]*|[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?'
    r"|\*\*|//|==|!=|<=|>=|\+=|\*=|-=|/=|\.\.|&&|\|\||->|:=|.",
    re.DOTALL,
)
BRACKETS = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True)
class Stopped:
    """Where reading stopped: the text, the offset, and the terminals that could have come."""

    source: Source
    start: int
    offset: int
    accepted: frozenset[str]

    @cached_property
    def found(self) -> str:
        """The token that should not be there, "" at the end of the text."""
        match = _TOKEN.match(self.source.text, self.offset)
        return match[0] if match else ""

    @cached_property
    def rest(self) -> str:
        """The line from the token on."""
        end = self.source.text.find("\n", self.offset)
        return self.source.text[self.offset : end if end >= 0 else None][:200]

    @cached_property
    def tokens(self) -> list[tuple[str, int]]:
        """The tokens before the offset, with their places."""
        matches = _TOKEN.finditer(self.source.text, self.start, self.offset)
        return [(match[0], match.start()) for match in matches if not match[0].isspace() and match[0][0] != "#"]

    def before(self, number: int = 1) -> str:
        """The token that many places before the offset, its start if it is very long, "" in front of the first."""
        return self.tokens[-number][0][:60] if len(self.tokens) >= number else ""

    @cached_property
    def open(self) -> list[tuple[str, int]]:
        """The brackets before the offset that are not closed."""
        stack: list[tuple[str, int]] = []
        for token, offset in self.tokens:
            if token in ("(", "[", "{"):
                stack.append((token, offset))
            elif token in BRACKETS and stack and stack[-1][0] == BRACKETS[token]:
                stack.pop()
        return stack

    @cached_property
    def item(self) -> str:
        """The word that begins the item, "" between items."""
        item, depth, previous = "", 0, ""
        for token, offset in self.tokens:
            line = self.source.text.rfind("\n", 0, offset) + 1
            begins = self.source.text[line:offset].isspace() or line == offset or previous[:1] in ("", "}", '"')
            if depth == 0 and begins and token in ITEMS:
                item = token
            depth += (token in ("(", "[", "{")) - (token in BRACKETS)
            previous = token
        return item


def quoted(text: str) -> str:
    """A piece of the text in a message, its start if it is long."""
    return f"`{text if len(text) <= 40 else text[:37] + '...'}`"
