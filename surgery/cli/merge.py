"""`surgery merge`: a run into an ordinary Hugging Face folder."""

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
    load_run,
    note,
    reporting,
)

EXAMPLE = "Example: surgery merge runs/demo -o merged; then AutoModel...from_pretrained('merged')"
NEEDS_ARGUMENTS = True


def run(
    run: RunArgument,
    folder: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="the folder to write")],
    best: BestOption = False,
    format: FormatOption = Format.text,
    allow_code: CodeOption = False,
) -> None:
    """Merge a run into the model's weights: a standard folder that plain transformers loads, with the tokenizer."""
    with reporting(format):
        from surgery.compiler.diagnostics import SurgError
        from surgery.runtime.data.chat import keep_template
        from surgery.runtime.merge import save_merged
        from surgery.runtime.models import load_tokenizer
        from surgery.runtime.run_folder import load_state

        run = chosen(run, best)
        labels = tuple(load_state(run).extra.get("labels", ()))
        step = load_run(run, "cpu", allow_code)
        try:
            tokenizer = load_tokenizer(step.plan.model, step.folder)
            keep_template(tokenizer, step.plan.data)
        except SurgError:
            model = step.plan.model
            if model.source != "config" or model.tokenizer is not None:  # a config alone has none to write
                raise
            tokenizer = None
        save_merged(step, folder, tokenizer, labels)
        if (base := step.plan.quantized) is not None:
            note(f"{len(base.weights)} weights that the run keeps in {base.kind} are written as what these stand for")
    if format is Format.json:
        answer({"run": str(run), "folder": str(folder), "sites": step.plan.totals.sites})
    else:
        typer.echo(f"{folder}: {step.plan.totals.sites} sites merged")
