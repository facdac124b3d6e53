"""p1: text -> Tree. The grammar is `grammar/surg.lark`; any text gives a tree or located diagnostics.

Nothing here recurses on the text: Lark's LALR parser keeps its own stack, and the tree is built from the leaves up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Any

from lark import Lark, Token
from lark import Tree as Parsed
from lark.exceptions import UnexpectedInput

from surgery.compiler import nodes
from surgery.compiler.comments import Block, Comments
from surgery.compiler.diagnostics import Diagnostics
from surgery.compiler.nodes import Tree
from surgery.compiler.span import Source, Span
from surgery.compiler.syntax_errors import describe

MAXIMUM_CHARACTERS = 1 << 20
MAXIMUM_TOKENS = 100_000  # words, numbers and signs: a few seconds of reading
MAXIMUM_DEPTH = 100  # operators and brackets within each other; later passes may then recurse on expressions
MAXIMUM_PARTS = 5_000  # of one expression
MAXIMUM_DIGITS = 100  # of one number
MAXIMUM_EXPONENT = 400  # beyond any float64
MAXIMUM_ERRORS = 20

# Control characters and halves of surrogate pairs: nothing that could be shown or written back.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]|\r(?!\n)")
_TOKEN = re.compile(r'"[^"\\\n]*(?:\\.[^"\\\n]*)*"|#[^\n]*|\w+|[^\w\s]')
_NEXT_ITEM = re.compile(r"^(?:use|model|data|adapt|train|freeze|step|method)\b(?!\s*=)", re.MULTILINE)


def run(source: Source) -> Tree:
    """The tree of a text. Raises `SurgError` with SURG001 for syntax and SURG010 for what is too large or too deep."""
    found = Diagnostics()
    _check_extent(source, found)
    found.raise_errors()
    parsed = _parse(source, found)
    found.raise_errors()
    assert parsed is not None
    tree = _Builder(source, found).build(parsed)
    found.raise_errors()
    return tree


def _check_extent(source: Source, found: Diagnostics) -> None:
    """Report what is too large or too deep to be read in reasonable time, or cannot be shown; without Lark."""
    text = source.text
    if len(text) > MAXIMUM_CHARACTERS:
        message = f"the text has {len(text):,} characters; at most {MAXIMUM_CHARACTERS:,} are read"
        advice = "a spec is a few lines; data belongs in files that the spec names"
        found.error("SURG010", message, Span(source, 0, 1), help=advice)
        return
    if unprintable := _UNPRINTABLE.search(text):
        message = f"unexpected character U+{ord(unprintable[0]):04X}, which cannot be shown"
        advice = "delete it; is this a text file in UTF-8?"
        found.error("SURG001", message, Span(source, *unprintable.span()), help=advice)
    depth = 0
    for number, token in enumerate(_TOKEN.finditer(text), 1):
        depth += (token[0] in "([{") - (token[0] in ")]}")
        if depth > MAXIMUM_DEPTH or number > MAXIMUM_TOKENS:
            what = f"the text has more than {MAXIMUM_TOKENS:,} words and signs"
            deep = f"the brackets are nested more than {MAXIMUM_DEPTH} deep"
            found.error("SURG010", deep if depth > MAXIMUM_DEPTH else what, Span(source, *token.span()))
            break


@cache
def _parser() -> Lark:
    grammar = (files("surgery.grammar") / "surg.lark").read_text("utf-8")
    return Lark(grammar, parser="lalr", propagate_positions=True, maybe_placeholders=True)


def _parse(source: Source, found: Diagnostics) -> Parsed[Token] | None:
    """Lark's tree, or None and errors: after one, reading goes on at the next line that begins an item."""
    start = 0
    while len(found.found) < MAXIMUM_ERRORS:
        try:
            # What was read already is blanked, not cut off, so that positions stay those of the whole text.
            parsed = _parser().parse(" " * start + source.text[start:])
            return None if found.found else parsed
        except UnexpectedInput as error:
            diagnostic, position = describe(error, source, start)
            found.found.append(diagnostic)
        following = _NEXT_ITEM.search(source.text, max(position, start + 1))
        if following is None:
            break
        start = following.start()
    return None


class _Builder:
    """Makes nodes from Lark's tree: one method per rule of the grammar, called with its place and its parts."""

    def __init__(self, source: Source, found: Diagnostics) -> None:
        self.source = source
        self.found = found
        self.comments = Comments(source.text)

    def build(self, parsed: Parsed[Token]) -> Tree:
        """The tree of nodes, built from the leaves up without recursion."""
        done: dict[int, tuple[Any, int, int]] = {}  # a rule's node, its depth and its number of parts
        result: Any = None
        for rule in parsed.iter_subtrees():
            parts, depth, size, largest = [], 0, 1, 0
            for child in rule.children:
                if isinstance(child, Parsed):
                    node, child_depth, child_size = done.pop(id(child))
                    depth, size, largest = max(depth, child_depth), size + child_size, max(largest, child_size)
                else:
                    node = child
                parts.append(node)
            result = getattr(self, rule.data)(self._span(rule), parts)
            if isinstance(result, nodes.Expr | nodes.Argument | nodes.Slice):
                depth += 1
                self._check_size(result, depth, size if largest <= MAXIMUM_PARTS else 0)
            else:
                depth = size = 0
            done[id(rule)] = result, depth, size
        assert isinstance(result, Tree)
        return result

    def _span(self, rule: Parsed[Token]) -> Span:
        meta = rule.meta
        if meta.empty:
            return Span(self.source, 0, 0)
        # The container is the node with the parentheses around it.
        start = getattr(meta, "container_start_pos", meta.start_pos)
        return Span(self.source, start, getattr(meta, "container_end_pos", meta.end_pos))

    def _at(self, token: Token) -> Span:
        start = token.start_pos or 0
        return Span(self.source, start, start + len(token))

    def _check_size(self, node: nodes.Node, depth: int, size: int) -> None:
        # Only the innermost node that crosses a limit is reported, not those around it.
        if depth == MAXIMUM_DEPTH + 1:
            message = f"the expression is nested more than {MAXIMUM_DEPTH} deep"
            self.found.error("SURG010", message, node.span, help="give its parts names: `part = ...` on a line each")
        if size > MAXIMUM_PARTS:
            message = f"the expression has more than {MAXIMUM_PARTS:,} parts"
            self.found.error("SURG010", message, node.span, help="give its parts names: `part = ...` on a line each")
        if len(self.found.found) >= MAXIMUM_ERRORS:
            self.found.raise_errors()

    # --- items --------------------------------------------------------------------------------------------------------

    def start(self, span: Span, parts: list[Any]) -> Tree:
        end = len(self.source.text)
        items, closing = self.comments.give(parts, 0, end, separate=True)
        return Tree(tuple(items), closing, span=Span(self.source, 0, end))

    def use(self, span: Span, parts: list[Any]) -> nodes.Use:
        return nodes.Use(self._text(parts[0]), **self._line(span))

    def model(self, span: Span, parts: list[Any]) -> nodes.Model:
        source, name, block = parts
        return nodes.Model(str(source or "hub"), self._text(name), **self._owner(span, "settings", block))

    def data(self, span: Span, parts: list[Any]) -> nodes.Data:
        return nodes.Data(self._text(parts[0]), **self._owner(span, "settings", parts[1]))

    def train(self, span: Span, parts: list[Any]) -> nodes.Train:
        return nodes.Train(self._pattern(parts[0]), **self._owner(span, "settings", parts[1]))

    def freeze(self, span: Span, parts: list[Any]) -> nodes.Freeze:
        return nodes.Freeze(self._pattern(parts[0]), **self._line(span))

    def step(self, span: Span, parts: list[Any]) -> nodes.Step:
        return nodes.Step(**self._owner(span, "settings", parts[0]))

    def adapt(self, span: Span, parts: list[Any]) -> nodes.Adapt:
        pattern, classes, where, exceptions, block = parts
        owner = self._owner(span, "clauses", block)
        return nodes.Adapt(self._pattern(pattern), classes, where, exceptions, **owner)

    def method(self, span: Span, parts: list[Any]) -> nodes.Method:
        name, parameters, block = parts
        return nodes.Method(str(name), parameters, **self._owner(span, "statements", block))

    # --- blocks and lines ---------------------------------------------------------------------------------------------

    def _block(self, span: Span, parts: list[Any]) -> Block:
        return self.comments.block(span, parts)

    schedule = settings = clauses = statements = changes = _block

    def _line(self, span: Span) -> dict[str, Any]:
        return {"comments": self.comments.inside(span.start, span.end), "span": span}

    def _owner(self, span: Span, field: str, block: Block | None) -> dict[str, Any]:
        """The fields of a line with a block, whose own lines go to `field`."""
        if block is None:
            return self._line(span)
        comments = self.comments.inside(span.start, block.span.start)
        own = {"comments": comments, "trailing": block.head, "closing": block.closing, "span": span}
        return {field: block.elements, **own}

    def setting(self, span: Span, parts: list[Any]) -> nodes.Setting:
        return nodes.Setting(str(parts[0]), parts[1], **self._line(span))

    def with_(self, span: Span, parts: list[Any]) -> nodes.With:
        return nodes.With(parts[0], **self._line(span))

    def expect(self, span: Span, parts: list[Any]) -> nodes.Expect:
        self._check_number(parts[0], 9)
        return nodes.Expect(int(parts[0][:9]), **self._line(span))

    def alias(self, span: Span, parts: list[Any]) -> nodes.Alias:
        return nodes.Alias(str(parts[0]), **self._line(span))

    def tensor(self, span: Span, parts: list[Any]) -> nodes.Tensor:
        name, role, start, shared, block = parts
        by, group = shared or (None, None)
        # The options stay on the tensor's line, and so do their comments.
        options = block.elements if block else ()
        plain = tuple(nodes.Setting(each.name, each.value, span=each.span) for each in options)
        return nodes.Tensor(str(name), role, start, by, group, plain, **self._line(span))

    def bind(self, span: Span, parts: list[Any]) -> nodes.Bind:
        return nodes.Bind(str(parts[0]), parts[1], **self._line(span))

    def require(self, span: Span, parts: list[Any]) -> nodes.Require:
        return nodes.Require(parts[0], **self._line(span))

    def event(self, span: Span, parts: list[Any]) -> nodes.Event:
        phase, point, when, block = parts
        return nodes.Event(str(phase), str(point), None, when, **self._owner(span, "changes", block))

    def every(self, span: Span, parts: list[Any]) -> nodes.Event:
        interval, when, block = parts
        return nodes.Event("every", "steps", interval, when, **self._owner(span, "changes", block))

    def change(self, span: Span, parts: list[Any]) -> nodes.Change:
        return nodes.Change(str(parts[0]), str(parts[1]), parts[2], **self._line(span))

    def reset(self, span: Span, parts: list[Any]) -> nodes.Reset:
        return nodes.Reset(self._words(parts), **self._line(span))

    # --- parts of lines -----------------------------------------------------------------------------------------------

    def _words(self, parts: Iterable[Token]) -> tuple[str, ...]:
        return tuple(str(part) for part in parts)

    def classes(self, span: Span, parts: list[Any]) -> tuple[str, ...]:
        return self._words(parts)

    def exceptions(self, span: Span, parts: list[Any]) -> tuple[nodes.Pattern, ...]:
        return tuple(self._pattern(part) for part in parts)

    def parameters(self, span: Span, parts: list[Any]) -> tuple[nodes.Parameter, ...]:
        return tuple(parts)

    def parameter(self, span: Span, parts: list[Any]) -> nodes.Parameter:
        return nodes.Parameter(str(parts[0]), str(parts[1]), parts[2], span=span)

    def shared(self, span: Span, parts: list[Any]) -> tuple[str, str | None]:
        return str(parts[0]), str(parts[1]) if parts[1] else None

    def _pattern(self, token: Token) -> nodes.Pattern:
        return nodes.Pattern(str(token), span=self._at(token))

    # --- expressions --------------------------------------------------------------------------------------------------

    def number(self, span: Span, parts: list[Any]) -> nodes.Number:
        self._check_number(parts[0], MAXIMUM_DIGITS)
        return nodes.Number(str(parts[0]), span=span)

    def _check_number(self, token: Token, digits: int) -> None:
        exponent = re.search(r"[eE][+-]?0*([0-9]+)$", token)
        if len(token) > digits:
            message = f"the number has {len(token)} digits; at most {digits} are read here"
            self.found.error("SURG010", message, self._at(token))
        elif exponent and (len(exponent[1]) > 3 or int(exponent[1]) > MAXIMUM_EXPONENT):
            message = f"the exponent is larger than {MAXIMUM_EXPONENT}"
            self.found.error("SURG010", message, self._at(token), help="a float64 goes from 5e-324 to 1.8e308")

    def string(self, span: Span, parts: list[Any]) -> nodes.String:
        return nodes.String(self._text(parts[0]), span=span)

    def _text(self, token: Token) -> str:
        """The value of a text in double quotes; its escapes are JSON's."""
        try:
            value = json.loads(token, strict=False)
            value.encode()
        except ValueError:
            message = "the text has an escape that is not known"
            known = r"known are `\"` `\\` `\n` `\t` `\r` and `\u00e9`; a backslash itself is `\\`"
            self.found.error("SURG001", message, self._at(token), help=known)
            return ""
        assert isinstance(value, str)
        return value

    def boolean(self, span: Span, parts: list[Any]) -> nodes.Boolean:
        return nodes.Boolean(parts[0] == "true", span=span)

    def name(self, span: Span, parts: list[Any]) -> nodes.Name:
        name = str(parts[0])
        if name in ("True", "False"):
            self.found.error("SURG001", f"`{name}` is not a value", span, help=f"write `{name.lower()}`")
        return nodes.Name(name, span=span)

    def unary(self, span: Span, parts: list[Any]) -> nodes.Unary:
        return nodes.Unary(str(parts[0]), parts[1], span=span)

    def binary(self, span: Span, parts: list[Any]) -> nodes.Binary:
        left, operator, right = parts
        return nodes.Binary(str(operator), left, right, operator_span=self._at(operator), span=span)

    def field(self, span: Span, parts: list[Any]) -> nodes.Field | nodes.Transpose:
        operand, name = parts
        return nodes.Transpose(operand, span=span) if name == "T" else nodes.Field(operand, str(name), span=span)

    def subscript(self, span: Span, parts: list[Any]) -> nodes.Subscript:
        return nodes.Subscript(parts[0], tuple(parts[1:]), span=span)

    def slice(self, span: Span, parts: list[Any]) -> nodes.Slice:
        return nodes.Slice(parts[0], parts[1], span=span)

    def list_of(self, span: Span, parts: list[Any]) -> nodes.ListOf:
        return nodes.ListOf(tuple(parts), span=span)

    def call(self, span: Span, parts: list[Any]) -> nodes.Call:
        function, *rest = parts
        wrapped = (
            nodes.Argument(part, span=part.span) if isinstance(part, nodes.Comprehension) else part for part in rest
        )
        return nodes.Call(str(function), tuple(wrapped), span=span)

    def argument(self, span: Span, parts: list[Any]) -> nodes.Argument:
        return nodes.Argument(parts[0], span=span)

    def named(self, span: Span, parts: list[Any]) -> nodes.Argument:
        return nodes.Argument(parts[1], str(parts[0]), span=span)

    def comprehension(self, span: Span, parts: list[Any]) -> nodes.Comprehension:
        body, variable, first, last = parts
        return nodes.Comprehension(body, str(variable), first, last, span=span)
