"""The numbers that a run wrote down, as series over its steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.compiler.diagnostics import fail
from surgery.runtime.run_folder import METRICS


@dataclass(frozen=True)
class Series:
    """One number over the steps at which it was written; steps count from 0."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        """The newest value."""
        return self.values[-1]


def read_series(run: Path) -> dict[str, Series]:
    """Every number of `metrics.jsonl` by its name, in the order of first appearance; none where there is no such file.

    Objects of numbers give a series for each of theirs, called `name/key`. A last line that a crash cut off is left
    out; any other line that is no row raises SURG054.
    """
    path = run / METRICS
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    found: dict[str, tuple[list[int], list[float]]] = {}
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break was cut off, or is nothing
        for name, step, value in _numbers(line, f"{path}, line {number}"):
            steps, values = found.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return {name: Series(name, tuple(steps), tuple(values)) for name, (steps, values) in found.items()}


def _numbers(line: bytes, where: str) -> list[tuple[str, int, float]]:
    try:
        row = json.loads(line)
        step = row.pop("step")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise _no_row(where) from error
    if not isinstance(step, int):
        raise _no_row(where)
    return [(name, step, float(value)) for name, value in _flat(row) if _is_number(value)]


def _flat(row: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in row.items():
        inner = value.items() if isinstance(value, dict) else None
        found += [(name, value)] if inner is None else [(f"{name}/{key}", part) for key, part in inner]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _no_row(where: str) -> Exception:
    help = "a crash cuts off no more than the last line, which `surgery train --resume` mends"
    return fail("SURG054", f"{where}: no row of metrics", help=help)
