"""From a place that the plan remembers back to a span of the spec's text: errors of a run still show their line."""

from __future__ import annotations

from pathlib import Path

from surgery.compiler.diagnostics import Note
from surgery.compiler.plan import Place
from surgery.compiler.span import Source, Span


def span_of(place: Place | None, folder: Path) -> Span | None:
    """The span of a place, if the file is still there in `folder` and still has that text's shape; else None."""
    if place is None:
        return None
    for path in (Path(place.file), folder / place.file, folder / Path(place.file).name):
        try:
            source = Source(place.file, path.read_bytes().decode("utf-8"))
        except (OSError, ValueError):
            continue
        if place.end <= len(source.text) and source.position(place.start) == (place.line, place.column):
            return Span(source, place.start, place.end)
    return None


def place_notes(place: Place | None, folder: Path) -> tuple[Note, ...]:
    """A note that names the line where `span_of` cannot quote it, for example because the spec has changed since."""
    if place is None or span_of(place, folder) is not None:
        return ()
    return (Note(f"asked for at {place.file}:{place.line}:{place.column}"),)
