"""`surgery eval`: a run on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.common import (
    BestOption,
    CodeOption,
    DeviceOption,
    Format,
    FormatOption,
    RunArgument,
    answer,
    chosen,
    data_of,
    load_run,
    reporting,
)

EXAMPLE = "Example: surgery eval runs/demo --format json"
NEEDS_ARGUMENTS = True


def run(
    run: RunArgument,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="rows to evaluate on; left out: the spec's held-out rows",
                     show_default=False),
    ] = None,
    best: BestOption = False,
    device: DeviceOption = None,
    format: FormatOption = Format.text,
    allow_code: CodeOption = False,
) -> None:  # fmt: skip
    """Evaluate a run: the loss, and what its task has beside it.

    Perplexity for causal models; accuracy, macro F1 and Matthews for classes; Pearson and Spearman for a regression.
    """
    with reporting(format):
        from surgery.compiler.diagnostics import fail
        from surgery.runtime.data import load_evaluation
        from surgery.runtime.evaluate import evaluate
        from surgery.runtime.models import load_tokenizer
        from surgery.runtime.run_folder import load_state

        run = chosen(run, best)
        labels = tuple(load_state(run).extra.get("labels", ()))
        step = load_run(run, device, allow_code)
        if data is not None:
            tokenizer = load_tokenizer(step.plan.model, step.folder)
            examples = load_evaluation(step.plan, step.folder, tokenizer, data, labels)
        elif (held_out := data_of(step.plan, step.folder, labels).held_out) is not None:
            examples = held_out
        else:
            help = "write holdout = 0.2 or eval = FILE in the data block, or give --data FILE"
            raise fail("SURG052", "the spec holds no rows out to evaluate on", help=help)
        result = evaluate(step, examples)
    if format is Format.json:
        answer({"run": str(run), **result, "rows": len(examples)})
    else:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in result.items() if name != "rows")
        typer.echo(f"{run}: {scores} on {len(examples):,} rows")
