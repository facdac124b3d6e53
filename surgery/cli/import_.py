"""`surgery import`: an adapter of peft as a spec, and as a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.common import Format, FormatOption, answer, check_output, quiet, reporting, write_text
from surgery.cli.words import known_task

EXAMPLE = (
    "Example: surgery import adapter/adapter_config.json -o lora.surg --run runs/lora; then surgery merge runs/lora"
)
NEEDS_ARGUMENTS = True


def run(
    source: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="peft's adapter_config.json, or its folder", show_default=False)
    ],
    spec: Annotated[Path, typer.Option("-o", "--output", metavar="SPEC", help="the .surg file to write")],
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="RUN", help="a run folder of its tensors, to write too", show_default=False),
    ] = None,
    add: Annotated[
        Path | None,
        typer.Option("--add", metavar="FILE", show_default=False,
                     help="a .surg file to put behind the spec: a data block to evaluate on, a step block"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="a folder or hub id instead of its own", show_default=False),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="of the model, where the adapter does not say it", show_default=False,
                     callback=known_task),
    ] = None,
    format: FormatOption = Format.text,
) -> None:  # fmt: skip
    """Write a spec with the same model as an adapter of peft: LoRA and its kin, AdaLoRA, VeRA, LoHa, LoKr, IA3, OFT."""
    with reporting(format):
        from surgery.compiler.source import read
        from surgery.peft.importing import import_adapter, save_run
        from surgery.runtime.run_folder import is_run

        if spec.exists():
            raise typer.BadParameter(f"`{spec}` exists already; name a new file", param_hint="-o")
        if run is not None:
            check_output(run)
            if is_run(run):
                raise typer.BadParameter(f"`{run}` holds a run; name a new folder", param_hint="--run")
        quiet()
        more = "" if add is None else read(add).text
        imported = import_adapter(source, spec.parent, model, task, more)
        if run is not None:
            save_run(imported, source, spec, run)
        write_text(spec, imported.text)
    if format is Format.json:
        made = {"source": str(source), "spec": str(spec), "run": None if run is None else str(run)}
        answer(made | {"sites": imported.sites})
    else:
        typer.echo(f"{spec}: {imported.sites} sites" + (f"; {run}: their tensors" if run else ""))
