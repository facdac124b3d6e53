"""`surgery export`: a run as an adapter that other libraries serve."""

from __future__ import annotations

from enum import StrEnum
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
    as_json,
    chosen,
    load_run,
    note,
    reporting,
    show,
)
from surgery.cli.words import one_of

EXAMPLE = "Example: surgery export runs/demo --to peft -o adapter; then PeftModel.from_pretrained(model, 'adapter')"
NEEDS_ARGUMENTS = True
QUANTIZED = {  # the models of transformers whose weights are those of a run
    "nf4": 'BitsAndBytesConfig(load_in_4bit = True, bnb_4bit_quant_type = "nf4")',
    "int8": "BitsAndBytesConfig(load_in_8bit = True)",
}


class To(StrEnum):
    """Whose format."""

    peft = "peft"


class Dtype(StrEnum):
    """How the factors are stored."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


def run(
    run: RunArgument,
    to: Annotated[To, typer.Option("--to", help="the library that loads it", show_default=False, **one_of(To))],
    folder: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="the folder to write")],
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="of the factors, rounded once from float64", **one_of(Dtype))
    ] = Dtype.float32,
    best: BestOption = False,
    format: FormatOption = Format.text,
    allow_code: CodeOption = False,
) -> None:
    """Write a run as a LoRA or a DoRA of peft, exact for every method whose change of W has a proved rank."""
    with reporting(format):
        import torch

        from surgery.peft.write import export

        if folder.exists() and not folder.is_dir():
            raise typer.BadParameter(f"`{folder}` is a file; name a folder", param_hint="-o")
        run = chosen(run, best)
        step = load_run(run, "cpu", allow_code)
        made = export(step, step.folder, folder, getattr(torch, dtype))
        if (base := step.plan.quantized) is not None:
            note(f"the run was trained over weights in {base.kind}: load the adapter onto {QUANTIZED[base.kind]}")
    sites, rank = step.plan.totals.sites, made.config["r"]
    kind = "DoRA" if made.config["use_dora"] else "LoRA"
    if format is Format.json:
        told = {"run": str(run), "folder": str(folder), "to": str(to), "kind": kind, "rank": rank, "sites": sites}
        answer(told | {"modules_to_save": made.config["modules_to_save"] or []} | as_json(made.warnings))
    else:
        show(made.warnings)
        typer.echo(f"{folder}: {sites} sites as a {kind} of rank {rank}")
