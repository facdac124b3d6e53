"""Packages that only some specs need: imported when they are, and an error that says how to install them."""

from __future__ import annotations

import importlib
from types import ModuleType

from surgery.compiler.diagnostics import fail
from surgery.compiler.span import Span


def needed(module: str, extra: str, purpose: str, span: Span | None = None) -> ModuleType:
    """The module, imported; SURG063 where it is not installed. `extra` is its name among the project's extras.

    `purpose` ends the sentence "... needs the package X", `span` is what in the spec asks for it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            raise  # it is installed, and lacks something of its own
        help = f'pip install "surg[{extra}]"'
        raise fail(
            "SURG063", f"{purpose} needs the package `{package}`, which is not installed", span, help=help
        ) from error
