"""The commonest slips of who writes a spec: each function looks at where reading stopped, and gives a help or None."""

from __future__ import annotations

import re
from collections.abc import Callable

from surgery.compiler.diagnostics import nearest
from surgery.compiler.stopped import BRACKETS, ITEMS, Stopped, quoted

PHASES = ("after", "before", "at", "every")
_EVENTS = "an event is written `after step { ... }`, `after backward { ... }` or `every 100 steps { ... }`"
FUNCTION_WORDS = ("def", "function", "fn", "func", "class", "lambda")

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


def _written_otherwise(place: Stopped) -> str | None:
    return _WRITTEN.get(place.found)


def _entry_by_entry(place: Stopped) -> str | None:
    dotted = place.found in ("*", "/") and place.source.text[: place.offset].endswith(".")
    return "`*` and `/` work entry by entry, `@` is the matrix product" if dotted else None


def _comment(place: Stopped) -> str | None:
    slashes = place.rest.startswith(("//", "/*")) and "FLOOR" not in place.accepted
    return "a comment starts with `#` and runs to the end of its line" if slashes else None


def _pattern(place: Stopped) -> str | None:
    if not {"COLON", "_WHERE"} & place.accepted or place.found not in ("[", "{", ".", ","):
        return None
    if place.item == "method":
        return None
    if place.found == "," and "VBAR" in place.accepted:
        return f"classes are joined by `|`: `: {place.before()} | ...`"
    return "alternatives are written `{query, value}`, a range of indices `[8..15]`, any number of components `**`"


def _class(place: Stopped) -> str | None:
    if place.item != "adapt" or place.before() != ":" or place.accepted != {"NAME"}:
        return None
    return "behind `:` stands a class: `adapt encoder.** : Linear { ... }`"


def _unquoted(place: Stopped) -> str | None:
    name = re.match(r"[\w./-]+", place.rest)
    return f'write `"{name[0][:40]}"`' if name and place.accepted <= {"STRING", "SOURCE"} else None


def _single_quotes(place: Stopped) -> str | None:
    if place.found != "'":
        return None
    match = re.match(r"'([^'\n]*)'", place.rest)
    return f'texts stand in double quotes: "{match[1] if match else "text"}"'


def _unclosed_string(place: Stopped) -> str | None:
    return 'the text is not closed: it needs a `"` at its end, on the same line' if place.found == '"' else None


def _function(place: Stopped) -> str | None:
    if place.found not in FUNCTION_WORDS or "_METHOD" not in place.accepted:
        return None
    match = re.match(r"\w+\s+(\w+)", place.rest)
    return f"a method is written `method {match[1] if match else 'name'}(rank: int = 8) {{ ... }}`"


def _unknown_item(place: Stopped) -> str | None:
    if "_METHOD" not in place.accepted or not re.match(r"[A-Za-z]", place.found):
        return None
    if setting := re.match(r"\w+\s*=\s*[\w.\"-]*", place.rest):
        return f"settings stand in a block: `step {{ {setting[0]} }}`"
    known = nearest(place.found, ITEMS)
    return f"did you mean `{known}`?" if known else f"an item begins with {', '.join(ITEMS[:-1])} or {ITEMS[-1]}"


def _unopened(place: Stopped) -> str | None:
    if place.found == "}" and not place.open:
        return "nothing is open here that this brace could close"
    return None


def _closing(bracket: str) -> str:
    return next(closing for closing, opening in BRACKETS.items() if opening == bracket)


def _never_closed(place: Stopped) -> str | None:
    ended = not place.found or place.accepted == {"RBRACE"}
    return f"close it with `{_closing(place.open[-1][0])}`" if ended and place.open else None


def _missing_with(place: Stopped) -> str | None:
    if place.item != "adapt":
        return None
    if place.found == "with":
        return "the rule's clauses stand in braces: `adapt PATTERN { with lora(rank = 8) }`"
    if place.found == "(" and place.accepted == {"EQUAL"}:
        return f"write `with {place.before()}(...)`"
    return None


def _equal_sign(place: Stopped) -> str | None:
    if not place.accepted & {"EQUAL"} or not re.match(r"[A-Za-z_]", place.before()):
        return None
    name = place.before()
    if name in ("where", "except") and place.item == "adapt":
        return f"`{name}` stands behind the pattern, in front of the `{{`: `adapt **.query where in >= 256 {{ ... }}`"
    if name == "return":
        return "what a method computes has a name: `delta = ...`, `weight = ...` or `output = ...`"
    if place.found == "==":
        return f"one `=` gives a value: `{name} = ...`; `==` compares"
    if place.found == ":":
        value = re.match(r":\s*([\w.+\"-]+)", place.rest)
        return f"write `{name} = {value[1] if value else '...'}`"
    if place.found in ("+=", "*=", "-=", "/="):
        return f"only events change a value: `after step {{ {name} {place.found} ... }}`"
    if place.found == "{" and place.item == "method":
        return _EVENTS
    if place.found in BRACKETS or not place.found or place.found in ("@", "*", "/", "+", "-", "[", "."):
        return _no_operator(place)
    value = re.match(r"[\w.+\"-]+(\([^()\n]*\))?", place.rest)
    return f"write `{name} = {value[0]}`" if value else None


def _no_operator(place: Stopped) -> str | None:
    before = place.before(2)
    if re.match(r'[\w)\]"]', before) and before not in ITEMS:
        return (
            f"is an operator missing between {quoted(before)} and {quoted(place.before())}? `@` is the matrix product"
        )
    return None


def _assignment(place: Stopped) -> str | None:
    if "INCREASE" in place.accepted and place.found == "/=":
        return f"write `{place.before()} *= 1 / (...)`"
    return "`=` gives a value to a name; a comparison is written `==`" if place.found == "=" else None


def _quoted_name(place: Stopped) -> str | None:
    if place.found[:1] == '"' and "NAME" in place.accepted and "NUMBER" not in place.accepted:
        return f"names stand without quotes: `{place.found.strip(chr(34))[:40]} = ...`"
    return None


def _number_form(place: Stopped) -> str | None:
    if place.found == "." and re.match(r"\.[0-9]", place.rest):
        return f"write `0{re.match(r'[.][0-9]+', place.rest)[0]}`"  # type: ignore[index]
    if re.match(r"[0-9]+[A-Za-z_]", place.rest):
        return "a name does not begin with a digit, and a number has no unit"
    return None


def _tuple(place: Stopped) -> str | None:
    if place.found == "," and "RPAR" in place.accepted and "OR" in place.accepted:
        return "a list stands in square brackets: `[0.9, 0.999]`"
    return None


def _chain(place: Stopped) -> str | None:
    if place.found in ("==", "!=", "<", ">", "<=", ">=") and "OR" in place.accepted:
        return "comparisons do not chain: write `0 < a and a < 1`"
    return None


def _steps(place: Stopped) -> str | None:
    return "an interval counts optimizer steps: `every 100 steps { ... }`" if "_STEPS" in place.accepted else None


def _role(place: Stopped) -> str | None:
    roles = [word for word in (place.before(), place.before(2)) if word in ("train", "frozen", "state")]
    if not roles or "=" not in (place.before(2), place.before(3)):
        return None
    return f"a tensor is written `A = {roles[0]} zeros[out, rank]`; as a name, write `({roles[0]})`"


def _event(place: Stopped) -> str | None:
    if place.before() in PHASES and "_REQUIRES" not in place.accepted:
        return _EVENTS
    return None


def _separator(place: Stopped) -> str | None:
    if "COMMA" in place.accepted and "RPAR" in place.accepted and re.match(r'[\w"]', place.found):
        return "arguments are separated by commas: `lora(rank = 8, alpha = 16)`"
    return None


def _parameter(place: Stopped) -> str | None:
    if place.item != "method" or place.accepted != {"COLON"}:
        return None
    return f"a parameter has a kind: `{place.before()}: int = 8` (int, real, text, ...)"


def _range(place: Stopped) -> str | None:
    if "_TO" not in place.accepted:
        return None
    return "a comprehension runs over whole numbers, both ends included: `sum(circ(c[i]) for i in 0..terms - 1)`"


SLIPS: tuple[Callable[[Stopped], str | None], ...] = (
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
