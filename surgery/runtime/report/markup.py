"""HTML and SVG as text that is escaped by construction: only what `tag` made is taken as it is."""

from __future__ import annotations

import re
from html import escape

# Neither XML nor HTML has a form for these, escaped or not.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_VOID = {"meta", "path", "rect", "circle", "line"}


class Markup(str):
    """Text that is markup already."""


def text(content: str) -> Markup:
    """A text that shows as it is."""
    return content if isinstance(content, Markup) else Markup(escape(_CONTROLS.sub("\ufffd", content)))


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """An element; `class_` is the attribute class, other underscores are hyphens."""
    given = "".join(f' {key.strip("_").replace("_", "-")}="{text(str(value))}"' for key, value in attributes.items())
    if name in _VOID and not children:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(parts: tuple[str, ...] | list[str], between: str = "") -> Markup:
    """Parts one after the other."""
    return Markup(text(between).join(map(text, parts)))
