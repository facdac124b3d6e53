"""Text that surgery wrote, run as a module of its own."""

from __future__ import annotations

import linecache
from typing import Any


def executed(source: str, module: str, file: str) -> dict[str, Any]:
    """The names of a module with this text; `file` stands in tracebacks, where debuggers show the lines."""
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"__name__": module, "__file__": file}
    exec(compile(source, file, "exec"), namespace)
    return namespace
