"""`surgery compile`: a spec into a folder with the training step as readable, runnable Python."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.common import (
    CodeOption,
    DeviceOption,
    Format,
    FormatOption,
    SpecArgument,
    VerboseOption,
    answer,
    calibration_of,
    check_output,
    pass_log,
    quiet,
    reporting,
    show,
    write_text,
)

EXAMPLE = "Example: surgery compile specs/demo.surg -o compiled, then read compiled/step.py"
NEEDS_ARGUMENTS = True


def run(
    spec: SpecArgument,
    folder: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="the folder to write")],
    verbose: VerboseOption = False,
    device: DeviceOption = None,
    format: FormatOption = Format.text,
    allow_code: CodeOption = False,
) -> None:
    """Compile a spec: plan.json, adapters.safetensors (the start), graph.py (the rewritten model) and step.py.

    step.py is the training step itself, with comments that name the spec's lines. `surgery train DIR` runs it, and so
    does `python DIR/step.py --data FILE`.
    """
    with reporting(format):
        import surgery
        from surgery.runtime.run_folder import is_run, load_state

        check_output(folder)
        if is_run(folder) and load_state(folder).step > 0:
            raise typer.BadParameter(f"`{folder}` holds a run; choose another folder", param_hint="-o")
        quiet()
        with pass_log(verbose):
            program = surgery.parse(spec)
        show(program.warnings)
        batches = calibration_of(surgery.plan(program, allow_code=allow_code, numbers="draft"), program.folder)
        with pass_log(verbose):
            step = surgery.compile(program, device=device, calibration=batches, allow_code=allow_code)
        step.save(folder)
        write_text(folder / "graph.py", step.graph_source)
    if format is Format.json:
        answer({"folder": str(folder), "sites": step.plan.totals.sites, "trainable": step.plan.totals.trainable})
    else:
        typer.echo(f"{folder}: {step.plan.totals.sites} sites; read step.py, train with: surgery train {folder}")
