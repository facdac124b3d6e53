"""Syntax errors in people's terms: what was expected where, what stands there, and how to write it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from surgery.compiler.diagnostics import Diagnostic, Note, nearest
from surgery.compiler.span import Source, Span

ITEMS = ("model", "adapt", "train", "freeze", "step", "data", "method", "use")
PHASES = ("after", "before", "at", "every")
FUNCTION_WORDS = ("def", "function", "fn", "func", "class", "lambda")

# What stands in a text, coarsely: enough to name a token and to match brackets. The last alternative takes anything.
_TOKEN = re.compile(
    r'#[^\n]*|\s+|"[^"\\\n]*(?:\\.[^"\\\n]*)*"|[A-Za-z_][A-Za-z0-9_]*|[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?'
    r"|\*\*|//|==|!=|<=|>=|\+=|\*=|-=|/=|\.\.|&&|\|\||->|:=|.",
    re.DOTALL,
)
_BRACKETS = {")": "(", "]": "[", "}": "{"}

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


@dataclass(frozen=True)
class Place:
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
            elif token in _BRACKETS and stack and stack[-1][0] == _BRACKETS[token]:
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
            depth += (token in ("(", "[", "{")) - (token in _BRACKETS)
            previous = token
        return item


def describe(error: UnexpectedInput, source: Source, start: int) -> tuple[Diagnostic, int]:
    """The diagnostic of a Lark error in the text from `start` on, and the offset where reading may go on."""
    offset = len(source.text)
    if isinstance(error, UnexpectedCharacters) or isinstance(error, UnexpectedToken) and error.token.type != "$END":
        offset = error.pos_in_stream or 0
    interactive = getattr(error, "interactive_parser", None)
    place = _corrected(Place(source, start, offset, frozenset(interactive.accepts() if interactive else ())))
    message = f"expected {_expected(place)}{_behind(place)}, found {_found(place)}"
    notes = []
    if place.open and (not place.found or place.accepted == {"RBRACE"}):
        bracket, opening = place.open[-1]
        notes.append(Note(f"this `{bracket}` is never closed", Span(source, opening, opening + 1)))
    help = next((text for slip in SLIPS if (text := slip(place))), None)
    return Diagnostic("SURG001", message, _span(place), tuple(notes), help), place.offset


def _corrected(place: Place) -> Place:
    """The place where a reader sees the slip, which can be one token before the one where reading stopped."""
    if place.found == "=" and place.before() == "=" and place.offset == place.tokens[-1][1] + 1:
        return Place(place.source, place.start, place.offset - 1, frozenset({"EQUAL"}))  # `==` for `=`
    # Inside an open block the word that begins the next item reads as a name.
    if "EQUAL" in place.accepted and place.before() in ITEMS and place.open and re.match(r'["\w*{]', place.found):
        return Place(place.source, place.start, place.tokens[-1][1], frozenset({"RBRACE"}))
    return place


def _span(place: Place) -> Span:
    if place.found:
        length = len(place.rest.rstrip()) if place.found in ('"', "'") else len(place.found)
        return Span(place.source, place.offset, place.offset + max(1, length))
    # The end of the text is shown behind its last token, not on the empty line after it.
    end = place.tokens[-1][1] + len(place.tokens[-1][0]) if place.tokens else 0
    return Span(place.source, end, end)


def _quote(text: str) -> str:
    return f"`{text if len(text) <= 40 else text[:37] + '...'}`"


def _found(place: Place) -> str:
    if not place.found:
        return "the end of the file"
    if not place.found.isascii() and not place.found.isalnum():
        return f"{_quote(place.found)} (U+{ord(place.found[0]):04X})"
    return _quote(place.found)


def _behind(place: Place) -> str:
    if not place.before():
        return ""
    if {"COLON", "_WHERE"} <= place.accepted:
        return " after the pattern"
    return f" after {_quote(place.before())}"


def _expected(place: Place) -> str:
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


# --- the commonest slips: each looks at the place and gives a help, or None -------------------------------------------

_WRITTEN = {
    "^": "a power is written `x ** 2`",
    "&&": "write `and`: `step > 5 and step < 9`",
    "||": "write `or`: `step < 5 or step > 9`",
    "&": "write `and`: `step > 5 and step < 9`",
    "!": "write `not`: `not training`",
    "->": "a method says what it computes in its body: `delta = B @ A`",
    ":=": "write `=`: `rank = 8`",
    "“": 'texts stand in straight double quotes: "text"',
    "”": 'texts stand in straight double quotes: "text"',
    "×": "a product is written `a * b`, a matrix product `A @ B`",
    "·": "a product is written `a * b`, a matrix product `A @ B`",
    "−": "write the minus sign of the keyboard: `-`",
    "≤": "write `<=`",
    "≥": "write `>=`",
    "≠": "write `!=`",
    "ᵀ": "a transpose is written `A.T`",
    "$": "names stand alone: `rank`",
    ";": "drop the `;`: it stands only between the parts of a block",
    "/*": "a comment starts with `#` and runs to the end of its line",
}


def _written_otherwise(place: Place) -> str | None:
    return _WRITTEN.get(place.found)


def _entry_by_entry(place: Place) -> str | None:
    dotted = place.found in ("*", "/") and place.source.text[: place.offset].endswith(".")
    return "`*` and `/` work entry by entry, `@` is the matrix product" if dotted else None


def _comment(place: Place) -> str | None:
    slashes = place.rest.startswith(("//", "/*")) and "FLOOR" not in place.accepted
    return "a comment starts with `#` and runs to the end of its line" if slashes else None


def _pattern(place: Place) -> str | None:
    if not {"COLON", "_WHERE"} & place.accepted or place.found not in ("[", "{", ".", ","):
        return None
    if place.found == "," and "VBAR" in place.accepted:
        return f"classes are joined by `|`: `: {place.before()} | ...`"
    return "alternatives are written `{query, value}`, a range of indices `[8..15]`, any number of components `**`"


def _class(place: Place) -> str | None:
    if place.item != "adapt" or place.before() != ":" or place.accepted != {"NAME"}:
        return None
    return "behind `:` stands a class: `adapt encoder.** : Linear { ... }`"


def _unquoted(place: Place) -> str | None:
    name = re.match(r"[\w./-]+", place.rest)
    return f'write `"{name[0][:40]}"`' if name and place.accepted <= {"STRING", "SOURCE"} else None


def _single_quotes(place: Place) -> str | None:
    if place.found != "'":
        return None
    match = re.match(r"'([^'\n]*)'", place.rest)
    return f'texts stand in double quotes: "{match[1] if match else "text"}"'


def _unclosed_string(place: Place) -> str | None:
    return 'the text is not closed: it needs a `"` at its end, on the same line' if place.found == '"' else None


def _function(place: Place) -> str | None:
    if place.found not in FUNCTION_WORDS or "_METHOD" not in place.accepted:
        return None
    match = re.match(r"\w+\s+(\w+)", place.rest)
    return f"a method is written `method {match[1] if match else 'name'}(rank: int = 8) {{ ... }}`"


def _unknown_item(place: Place) -> str | None:
    if "_METHOD" not in place.accepted or not re.match(r"[A-Za-z]", place.found):
        return None
    if setting := re.match(r"\w+\s*=\s*[\w.\"-]*", place.rest):
        return f"settings stand in a block: `step {{ {setting[0]} }}`"
    known = nearest(place.found, ITEMS)
    return f"did you mean `{known}`?" if known else f"an item begins with {', '.join(ITEMS[:-1])} or {ITEMS[-1]}"


def _unopened(place: Place) -> str | None:
    if place.found == "}" and not place.open:
        return "nothing is open here that this brace could close"
    return None


def _closing(bracket: str) -> str:
    return next(closing for closing, opening in _BRACKETS.items() if opening == bracket)


def _never_closed(place: Place) -> str | None:
    ended = not place.found or place.accepted == {"RBRACE"}
    return f"close it with `{_closing(place.open[-1][0])}`" if ended and place.open else None


def _missing_with(place: Place) -> str | None:
    if place.item != "adapt":
        return None
    if place.found == "with":
        return "the rule's clauses stand in braces: `adapt PATTERN { with lora(rank = 8) }`"
    if place.found == "(" and place.accepted == {"EQUAL"}:
        return f"write `with {place.before()}(...)`"
    return None


def _equal_sign(place: Place) -> str | None:
    if not place.accepted & {"EQUAL"} or not re.match(r"[A-Za-z_]", place.before()):
        return None
    name = place.before()
    if place.found == "==":
        return f"one `=` gives a value: `{name} = ...`; `==` compares"
    if place.found == ":":
        value = re.match(r":\s*([\w.+\"-]+)", place.rest)
        return f"write `{name} = {value[1] if value else '...'}`"
    if place.found in ("+=", "*=", "-=", "/="):
        return f"only events change a value: `after step {{ {name} {place.found} ... }}`"
    if place.found in _BRACKETS or not place.found or place.found in ("@", "*", "/", "+", "-", "[", "."):
        return _no_operator(place)
    value = re.match(r"[\w.+\"-]+(\([^()\n]*\))?", place.rest)
    return f"write `{name} = {value[0]}`" if value else None


def _no_operator(place: Place) -> str | None:
    before = place.before(2)
    if re.match(r'[\w)\]"]', before) and before not in ITEMS:
        return (
            f"is an operator missing between {_quote(before)} and {_quote(place.before())}? `@` is the matrix product"
        )
    return None


def _assignment(place: Place) -> str | None:
    if "INCREASE" in place.accepted and place.found == "/=":
        return f"write `{place.before()} *= 1 / (...)`"
    return "`=` gives a value to a name; a comparison is written `==`" if place.found == "=" else None


def _quoted_name(place: Place) -> str | None:
    if place.found[:1] == '"' and "NAME" in place.accepted and "NUMBER" not in place.accepted:
        return f"names stand without quotes: `{place.found.strip(chr(34))[:40]} = ...`"
    return None


def _number_form(place: Place) -> str | None:
    if place.found == "." and re.match(r"\.[0-9]", place.rest):
        return f"write `0{re.match(r'[.][0-9]+', place.rest)[0]}`"  # type: ignore[index]
    if re.match(r"[0-9]+[A-Za-z_]", place.rest):
        return "a name does not begin with a digit, and a number has no unit"
    return None


def _tuple(place: Place) -> str | None:
    if place.found == "," and "RPAR" in place.accepted and "OR" in place.accepted:
        return "a list stands in square brackets: `[0.9, 0.999]`"
    return None


def _chain(place: Place) -> str | None:
    if place.found in ("==", "!=", "<", ">", "<=", ">=") and "OR" in place.accepted:
        return "comparisons do not chain: write `0 < a and a < 1`"
    return None


def _steps(place: Place) -> str | None:
    return "an interval counts optimizer steps: `every 100 steps { ... }`" if "_STEPS" in place.accepted else None


def _role(place: Place) -> str | None:
    roles = [word for word in (place.before(), place.before(2)) if word in ("train", "frozen", "state")]
    if not roles or "=" not in (place.before(2), place.before(3)):
        return None
    return f"a tensor is written `A = {roles[0]} zeros[out, rank]`; as a name, write `({roles[0]})`"


def _event(place: Place) -> str | None:
    if place.before() in PHASES and "_REQUIRES" not in place.accepted:
        return "an event is written `after step { ... }`, `after backward { ... }` or `every 100 steps { ... }`"
    return None


def _separator(place: Place) -> str | None:
    if "COMMA" in place.accepted and "RPAR" in place.accepted and re.match(r'[\w"]', place.found):
        return "arguments are separated by commas: `lora(rank = 8, alpha = 16)`"
    return None


def _parameter(place: Place) -> str | None:
    if place.item != "method" or place.accepted != {"COLON"}:
        return None
    return f"a parameter has a kind: `{place.before()}: int = 8` (int, real, text, ...)"


def _range(place: Place) -> str | None:
    if "_TO" not in place.accepted:
        return None
    return "a comprehension runs over whole numbers, both ends included: `sum(circ(c[i]) for i in 0..terms - 1)`"


SLIPS: tuple[Callable[[Place], str | None], ...] = (
    _written_otherwise,
    _entry_by_entry,
    _comment,
    _single_quotes,
    _unclosed_string,
    _function,
    _unknown_item,
    _unopened,
    _never_closed,
    _pattern,
    _class,
    _unquoted,
    _missing_with,
    _role,
    _parameter,
    _equal_sign,
    _assignment,
    _quoted_name,
    _number_form,
    _tuple,
    _chain,
    _steps,
    _range,
    _separator,
    _event,
)
