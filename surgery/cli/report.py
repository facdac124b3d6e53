"""`surgery report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.common import (
    BestOption,
    CodeOption,
    Format,
    FormatOption,
    RunArgument,
    answer,
    chosen,
    quiet,
    reporting,
    write_text,
)

EXAMPLE = "Example: surgery report runs/demo -o demo.html; the figures alone: surgery report runs/demo --format json"
NEEDS_ARGUMENTS = True


def run(
    run: RunArgument,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="the page to write; left out: report.html in the run",
                     show_default=False),
    ] = None,
    best: BestOption = False,
    format: FormatOption = Format.text,
    allow_code: CodeOption = False,
) -> None:  # fmt: skip
    """Show a run as one HTML page: its spec and plan, its numbers over the steps, and how far each weight moved.

    The page needs no network and no script. With `--format json` the figures go to standard output, and a page is
    written only with -o. With `--best` the weights are those of the best evaluation; the numbers are of all steps.
    """
    with reporting(format):
        from surgery.runtime.report.gather import gather
        from surgery.runtime.report.page import page

        quiet()
        report = gather(run, chosen(run, best), allow_code=allow_code)
        target = output if output is not None or format is Format.json else run / "report.html"
        if target is not None:
            write_text(target, page(report))
    if format is Format.json:
        answer({**report.as_dict(), "page": None if target is None else str(target)})
    else:
        missing = f"; without the model's own weights: {report.unreached}" if report.unreached else ""
        typer.echo(f"{target}: {report.step:,} steps, {len(report.changes):,} weights{missing}")
