"""Diagnostics are values: a stable code, a place, what was expected, how to fix it. One renderer for all of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

from surgery.compiler.span import Span

Severity = Literal["error", "warning"]

# Quoted lines go to terminals: no escape sequences, no halves of surrogate pairs.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Note:
    """A second place or fact that belongs to a diagnostic."""

    message: str
    span: Span | None = None


@dataclass(frozen=True)
class Diagnostic:
    """One problem, with its code (`SURG012`; `codes/SURG012.md` explains it) and its place in the spec or the data."""

    code: str
    message: str
    span: Span | None = None
    notes: tuple[Note, ...] = ()
    help: str | None = None
    severity: Severity = "error"

    def __post_init__(self) -> None:
        if self.help is None and not self.notes:  # nobody is left with the bare message
            object.__setattr__(self, "help", f"`surgery explain {self.code}` says why, and how to fix it")

    def as_dict(self) -> dict[str, Any]:
        """The JSON form, one of the public contract's `diagnostics`."""
        place: dict[str, Any] = dict.fromkeys(("file", "line", "column", "end_line", "end_column"))
        if self.span is not None:
            place = {name: getattr(self.span, name) for name in place}
        return {
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            **place,
            "notes": [note.message if note.span is None else f"{note.message} ({note.span})" for note in self.notes],
            "help": self.help,
        }


class SurgError(Exception):
    """Raised once with everything that a pass found wrong."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n" + "\n\n".join(render(diagnostic) for diagnostic in self.diagnostics))

    def __reduce__(self) -> tuple[type[SurgError], tuple[Sequence[Diagnostic]]]:
        return SurgError, (self.diagnostics,)  # pickled whole, so that it can leave a worker process


@dataclass
class Diagnostics:
    """What a pass has found so far; `raise_errors` ends the pass if anything is wrong."""

    found: list[Diagnostic] = field(default_factory=list)

    def error(
        self, code: str, message: str, span: Span | None = None, *, notes: Iterable[Note] = (), help: str | None = None
    ) -> None:
        """Record an error."""
        self.found.append(Diagnostic(code, message, span, tuple(notes), help))

    def warn(
        self, code: str, message: str, span: Span | None = None, *, notes: Iterable[Note] = (), help: str | None = None
    ) -> None:
        """Record a warning."""
        self.found.append(Diagnostic(code, message, span, tuple(notes), help, "warning"))

    @property
    def errors(self) -> list[Diagnostic]:
        """The errors, without warnings."""
        return [diagnostic for diagnostic in self.found if diagnostic.severity == "error"]

    @property
    def warnings(self) -> list[Diagnostic]:
        """The warnings."""
        return [diagnostic for diagnostic in self.found if diagnostic.severity == "warning"]

    def raise_errors(self) -> None:
        """Raise `SurgError` with all that was found, if there is an error among it; what many sites say stands once."""
        if self.errors:
            first: dict[tuple[str, str, Span | None], Diagnostic] = {}
            for diagnostic in self.found:
                first.setdefault((diagnostic.code, diagnostic.message, diagnostic.span), diagnostic)
            raise SurgError(list(first.values()))


def fail(
    code: str, message: str, span: Span | None = None, *, notes: Iterable[Note] = (), help: str | None = None
) -> SurgError:
    """A `SurgError` with one diagnostic, to be raised."""
    return SurgError([Diagnostic(code, message, span, tuple(notes), help)])


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name that is most like `name`, or the first that begins with it; None if none is alike."""
    known = list(names)
    same = [other for other in known if other.lower() == name.lower()]  # `LoRA` for `lora`
    begun = [other for other in known if len(name) > 3 and other.startswith(name)]
    matches = same or begun or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, names: Iterable[str]) -> str | None:
    """A help text that offers the nearest name, or the whole list where it is short."""
    known = list(names)
    if match := nearest(name, known):
        return f"did you mean `{match}`?"
    return f"known here: {', '.join(known)}" if 0 < len(known) <= 20 else None


def explain(code: str) -> str:
    """The page of a code (`SURG012`, also `12`): what it means, why it is an error, an example and the fix.

    Raises `SurgError` with SURG002 for a code that there is none of.
    """
    pages = {page.name.removesuffix(".md"): page for page in (files("surgery.compiler") / "codes").iterdir()}
    known = sorted(name for name in pages if name.startswith("SURG"))
    wanted = code.strip().upper()
    wanted = f"SURG{int(wanted):03d}" if wanted.isdecimal() and len(wanted) <= 3 else wanted
    if wanted not in known:
        shown = wanted if len(wanted) <= 40 else wanted[:37] + "..."
        raise fail("SURG002", f"there is no code `{shown}`", help=did_you_mean(wanted.replace("O", "0"), known))
    return pages[wanted].read_text("utf-8")


def render(diagnostic: Diagnostic) -> str:
    """The text form: code and message, file:line:column, the line with a caret, notes and help."""
    lines = [f"{diagnostic.severity}[{diagnostic.code}]: {diagnostic.message}"]
    lines += _quote(diagnostic.span, "^")
    for note in diagnostic.notes:
        lines.append(f"  note: {note.message}")
        lines += _quote(note.span, "-")
    if diagnostic.help:
        lines.append(f"  help: {diagnostic.help}")
    return "\n".join(lines)


def _quote(span: Span | None, mark: str) -> list[str]:
    if span is None:
        return []
    text, column = _UNPRINTABLE.sub("\ufffd", span.source.line(span.line)), span.column
    # The caret stays under its character where the line has tabs, and a span of several lines is marked on its first.
    length = span.end_column - column if span.end_line == span.line else len(text) - column + 1
    if len(text) > 160:  # a very long line is shown around the place
        cut = max(0, column - 60)
        text, column = ("..." if cut else "") + text[cut : cut + 120] + "...", column - cut + (3 if cut else 0)
        length = min(length, 60)
    margin = " " * len(str(span.line))
    indent = "".join("\t" if character == "\t" else " " for character in text[: column - 1])
    return [
        f" {margin}--> {span.file}:{span.line}:{span.column}",
        f" {margin} |",
        f" {span.line} | {text}",
        f" {margin} | {indent}{mark * max(1, length)}",
    ]
