"""Syntax errors in people's terms: what was expected where, what stands there, and how to write it."""

from __future__ import annotations

import re

from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from surgery.compiler.diagnostics import Diagnostic, Note
from surgery.compiler.slips import SLIPS
from surgery.compiler.span import Source, Span
from surgery.compiler.stopped import ITEMS, Stopped, quoted

_OPERATORS = {"AND", "OR", "COMPARE", "PLUS", "MINUS", "STAR", "SLASH", "FLOOR", "PERCENT", "AT", "POWER", "DOT"}
_VALUES = {"NAME", "NUMBER", "INT", "STRING", "BOOLEAN", "NOT", "MINUS", "LPAR", "LSQB"}
# Terminals that say together what can stand somewhere, the words for them, most telling first.
_GROUPS: tuple[tuple[set[str], set[str], str], ...] = (
    ({"_ADAPT", "_METHOD"}, {f"_{item.upper()}" for item in ITEMS} | {"$END"}, "an item such as `adapt` or `step`"),
    ({"NUMBER", "STRING"}, _VALUES | {"ROLE"}, "a value"),
    ({"_REQUIRES"}, {"_REQUIRES", "PHASE", "_EVERY", "NAME", "_SHARED"}, "a statement such as `delta = B @ A`"),
    ({"_RESET"}, {"_RESET", "NAME"}, "a change such as `W += delta`"),
    ({"_WITH"}, {"_WITH", "_EXPECT", "ALIAS", "NAME"}, "a clause such as `with lora(rank = 8)`"),
    ({"NAME", "RBRACE"}, {"NAME", "_TRAIN", "_FREEZE"}, "a setting such as `lr = 2e-3`"),
    ({"SOURCE"}, {"SOURCE", "STRING"}, 'a text in double quotes such as `"org/name"`'),
)
_WORDS = {
    "NAME": "a name",
    "STRING": "a text in double quotes",
    "INT": "a whole number",
    "PATTERN": "a pattern such as `encoder.layer.*.attention`",
    "COMPARE": "a comparison",
    "ROLE": "`train`, `frozen` or `state`",
    "PHASE": "`after`, `before` or `at`",
    "ALIAS": "`tie` or `untie`",
    "LBRACE": "`{`",
    "RBRACE": "`}`",
    "LPAR": "`(`",
    "RPAR": "`)`",
    "LSQB": "`[`",
    "RSQB": "`]`",
    "COLON": "`:`",
    "COMMA": "`,`",
    "EQUAL": "`=`",
    "INCREASE": "`+=`",
    "DECREASE": "`-=`",
    "SCALE": "`*=`",
    "VBAR": "`|`",
    "DOT": "`.`",
    "_TO": "`..`",
    "$END": "the end of the file",
}


def describe(error: UnexpectedInput, source: Source, start: int) -> tuple[Diagnostic, int]:
    """The diagnostic of a Lark error in the text from `start` on, and the offset where reading may go on."""
    offset = len(source.text)
    if isinstance(error, UnexpectedCharacters) or isinstance(error, UnexpectedToken) and error.token.type != "$END":
        offset = error.pos_in_stream or 0
    interactive = getattr(error, "interactive_parser", None)
    place = _corrected(Stopped(source, start, offset, frozenset(interactive.accepts() if interactive else ())))
    message = f"expected {_expected(place)}{_behind(place)}, found {_found(place)}"
    notes = []
    if place.open and (not place.found or place.accepted == {"RBRACE"}):
        bracket, opening = place.open[-1]
        notes.append(Note(f"this `{bracket}` is never closed", Span(source, opening, opening + 1)))
    help = next((text for slip in SLIPS if (text := slip(place))), None)
    return Diagnostic("SURG001", message, _span(place), tuple(notes), help), place.offset


def _corrected(place: Stopped) -> Stopped:
    """The place where a reader sees the slip, which can be one token before the one where reading stopped."""
    if place.found == "=" and place.before() == "=" and place.offset == place.tokens[-1][1] + 1:
        return Stopped(place.source, place.start, place.offset - 1, frozenset({"EQUAL"}))  # `==` for `=`
    # Inside an open block the word that begins the next item reads as a name.
    if "EQUAL" in place.accepted and place.before() in ITEMS and place.open and re.match(r'["\w*{]', place.found):
        return Stopped(place.source, place.start, place.tokens[-1][1], frozenset({"RBRACE"}))
    return place


def _span(place: Stopped) -> Span:
    if place.found:
        length = len(place.rest.rstrip()) if place.found in ('"', "'") else len(place.found)
        return Span(place.source, place.offset, place.offset + max(1, length))
    # The end of the text is shown behind its last token, not on the empty line after it.
    end = place.tokens[-1][1] + len(place.tokens[-1][0]) if place.tokens else 0
    return Span(place.source, end, end)


def _found(place: Stopped) -> str:
    if not place.found:
        return "the end of the file"
    if not place.found.isascii() and not place.found.isalnum():
        return f"{quoted(place.found)} (U+{ord(place.found[0]):04X})"
    return quoted(place.found)


def _behind(place: Stopped) -> str:
    if not place.before():
        return ""
    if {"COLON", "_WHERE"} <= place.accepted:
        return " after the pattern"
    return f" after {quoted(place.before())}"


def _expected(place: Stopped) -> str:
    left = set(place.accepted) - {"SEMICOLON"}
    if "SEMICOLON" in place.accepted:
        left.discard("COMMA")
    if "NUMBER" not in left:  # behind a complete value an operator could always follow
        left -= _OPERATORS | ({"LSQB", "LPAR"} if "POWER" in left else set())
    if "_REQUIRES" in left:
        left.discard("LBRACE")
    words = []
    for signs, members, word in _GROUPS:
        if signs <= left:
            words.append(word)
            left -= members
    words += sorted(_WORDS.get(terminal, f"`{terminal.strip('_').lower()}`") for terminal in left)
    if not words:
        return "an operator"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
