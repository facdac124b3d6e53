"""The method library: every `.surg` file in `surgery/methods/`, read once."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping

from surgery.compiler import nodes, p1_parse
from surgery.compiler.span import Source


@functools.cache
def library() -> Mapping[str, nodes.Method]:
    """The methods by name; being in the folder is the registration, the file's name is the method's."""
    found: dict[str, nodes.Method] = {}
    folder = importlib.resources.files("surgery") / "methods"
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if not entry.name.endswith(".surg"):
            continue
        tree = p1_parse.run(Source(f"methods/{entry.name}", entry.read_text(encoding="utf-8")))
        for item in tree.items:
            assert isinstance(item, nodes.Method), f"{entry.name} holds something else than methods"
            assert item.name not in found, f"{item.name} is defined twice in the library"
            found[item.name] = item
    return found
