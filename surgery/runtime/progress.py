"""The progress bar of a run: step, loss, rate, time left, on standard error and only where that is a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


def line(row: dict[str, Any]) -> str:
    """A row of metrics as one line; numbers of losses in full, so that two runs can be compared to the bit."""
    parts = [f"step {row['step']}", f"loss {row['loss']!r}", f"lr {row['lr']:.3g}"]
    parts += [f"{name.removeprefix('eval_')} {value:.4f}" for name, value in row.items() if name.startswith("eval_")]
    if "eval_loss" in row:
        parts.insert(3, "held out:")
    return "  ".join(parts)


class Progress:
    """A bar over the steps of a run; nothing at all if it is not wanted or standard error is no terminal."""

    def __init__(self, steps: int, done: int, wanted: bool) -> None:
        self.bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("lr {task.fields[rate]}"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (wanted and sys.stderr.isatty()),
        )
        self.task = self.bar.add_task("", total=steps, completed=done, loss="-", rate="-", speed="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self, row: dict[str, Any]) -> None:
        """One step is done, with this row of metrics."""
        speed = self.bar.tasks[0].speed
        self.bar.update(
            self.task,
            advance=1,
            loss=f"{row['loss']:.4f}",
            rate=f"{row['lr']:.2e}",
            speed="" if speed is None else f"{speed:.2f} steps/s",
        )
