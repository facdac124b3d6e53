"""Options that take one of some words: what is none of them is answered with the nearest."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import typer

from surgery.compiler.diagnostics import nearest


def one_of(words: type[StrEnum]) -> dict[str, Any]:
    """What an option that takes one of some words gives to typer: a reader that names the nearest one."""
    known = [word.value for word in words]

    def read(text: str) -> StrEnum:
        _check_word(text, known)
        return words(text)

    return {"parser": read, "metavar": f"<{'|'.join(known)}>"}


def _check_word(text: str, known: Iterable[str]) -> None:
    if text not in known:
        match = nearest(text, known)
        help_text = f"; did you mean `{match}`?" if match else ""
        raise typer.BadParameter(f"`{text}` is none of {', '.join(known)}{help_text}")


def known_task(task: str | None) -> str | None:
    """The callback of `--task`: a task that has a class of models."""
    if task is not None:
        from surgery.runtime.models import CLASSES

        _check_word(task, CLASSES)
    return task
