"""Paths that differ in nothing but numbers, as one pattern."""

from __future__ import annotations

import re
from collections.abc import Sequence


def folded_path(paths: Sequence[str]) -> str:
    """One pattern for paths that differ in numbers: `encoder.layer.[0..5].output`, `layers.{1,5}.mlp`."""
    columns = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(_component(list(dict.fromkeys(column))) for column in columns)


def _component(values: list[str]) -> str:
    if len(values) == 1:
        return values[0]
    numbers = sorted(map(int, values))
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"[{numbers[0]}..{numbers[-1]}]"
    return "{" + ",".join(map(str, numbers)) + "}"


def without_numbers(path: str) -> str:
    """What paths have in common that fold: `layers.#.mlp`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", path)
