"""What a row says, by the columns that the spec names: texts, labels and messages, every fault with its row."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from surgery.compiler.diagnostics import SurgError, did_you_mean
from surgery.runtime.data.files import Row, Rows

PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Entry:
    """One row, with its number from 1, and where it comes from."""

    source: Rows
    number: int
    row: Row

    def fail(self, code: str, message: str, help: str | None = None) -> SurgError:
        """An error about this row."""
        return self.source.fail(code, message, self.number, help)

    def column(self, name: str) -> Any:
        """The value of a column; SURG051 if there is none of that name."""
        if name not in self.row:
            columns = list(self.row)
            help = did_you_mean(name, columns)
            listed = ", ".join(columns[:40]) or "none"
            message = f"there is no column `{name}`; the columns are: {listed}"
            raise self.fail("SURG051", message, help if help and help.startswith("did") else None)
        return self.row[name]

    def text(self, template: str) -> str:
        """A template filled with columns: `{name}`, and `{{` for a brace. SURG051 for what is no text."""
        return PLACEHOLDER.sub(self._fill, template)

    def _fill(self, match: re.Match[str]) -> str:
        if match.group(0) in ("{{", "}}"):
            return match.group(0)[0]
        value = self.column(match.group(1))
        if isinstance(value, (dict, list, bytes)):
            raise self.fail("SURG051", f"column `{match.group(1)}` holds a {type(value).__name__}, not text")
        return value if isinstance(value, str) else "" if value is None else _spelt(value)

    def label(self, name: str) -> str | None:
        """A label's name; None where the row has none."""
        value = self.column(name)
        if isinstance(value, (dict, list, bytes)):
            raise self.fail("SURG051", f"the label is a {type(value).__name__}, not a name or a number")
        return None if value in (None, "") else value if isinstance(value, str) else _spelt(value)

    def value(self, label: str) -> float:
        """A label as the number that a regression learns."""
        try:
            value = float(label)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.fail("SURG051", f"one label is a regression, and `{brief(label)}` is not a number")
        return value


def brief(label: str) -> str:
    """A label for a message: a column that was not meant for labels can hold whole pages."""
    line = " ".join(label.split())
    return line if len(line) <= 40 else f"{line[:37]}..."


def _spelt(value: Any) -> str:
    """A number or a truth value as JSON has it, anything else (dates, decimals of Parquet files) as it prints."""
    return json.dumps(value) if isinstance(value, (bool, int, float)) else str(value)
