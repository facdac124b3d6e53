"""`surgery plan`: what a spec does to its model, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from surgery.cli.common import (
    CodeOption,
    Format,
    FormatOption,
    Scope,
    ScopeOption,
    calibration_of,
    output,
    pass_log,
    quiet,
    reporting,
    show,
    write_text,
)
from surgery.compiler.diagnostics import SurgError

if TYPE_CHECKING:
    from surgery.compiler.plan import Plan, SamplePlan

EXAMPLE = "Example: surgery plan specs/demo.surg -v -o plan.json"
NEEDS_ARGUMENTS = True


def run(
    spec: Annotated[Path | None, typer.Argument(metavar="SPEC", help="a .surg file", show_default=False)] = None,
    write: Annotated[
        Path | None, typer.Option("-o", "--output", help="also write the plan as JSON", show_default=False)
    ] = None,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="each pass; every site on its own; the cost of each way to run it")
    ] = False,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="also predict the memory of a step; captures the model, which takes a while"),
    ] = False,
    processes: Annotated[
        int,
        typer.Option("--processes", min=1, help="check it for so many processes; with --memory: what it takes on each"),
    ] = 1,
    scope: ScopeOption = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of plans and exit")] = False,
    format: FormatOption = Format.text,
    allow_code: CodeOption = False,
) -> None:
    """Show the plan: each adapted weight, its method, the trained numbers, how it is run and why, and what is proved.

    Only the model's config is read, not its weights: planning a 70B model takes seconds and little memory. Of the
    data the first rows are, where they and the tokenizer can be. A rank that is measured on the data
    (`hidden_dimension_gain`) takes the weights, and the rows that `calibrate` says.
    """
    with reporting(format), pass_log(verbose):
        if schema:
            typer.echo(schema_text(), nl=False)
            return
        if spec is None:
            raise typer.BadParameter("a SPEC is needed", param_hint="SPEC")
        import surgery
        from surgery.cli.plan_table import print_plan
        from surgery.runtime.distributed_checks import check_spread

        program = surgery.parse(spec)
        wanted: Literal["graph", "module"] = "module" if scope is Scope.module else "graph"
        batches = None
        if processes > 1 or scope is not None or program.reads_data:
            draft = surgery.plan(program, allow_code=allow_code, numbers="draft")
            check_spread(draft, wanted, processes).raise_errors()
            batches = calibration_of(draft, program.folder) if draft.measured else None
        plan = surgery.plan(
            program, memory=memory, processes=processes, scope=wanted, allow_code=allow_code, calibration=batches
        )
        plan = plan.model_copy(update={"sample": _sample(plan, program.folder)})
        text = plan.model_dump_json(indent=2) + "\n"
        if write is not None:
            write_text(write, text)
        show(program.warnings)
        if format is Format.json:
            typer.echo(text, nl=False)
        else:
            print_plan(output(), plan, verbose)


def _sample(plan: Plan, folder: Path) -> SamplePlan | None:
    """What a few rows of the data say; why they cannot be read is shown, and leaves the plan as it is."""
    from surgery.runtime.data.sample import sample
    from surgery.runtime.models import load_tokenizer

    if plan.data is None:
        return None
    quiet()
    try:
        found, reader = sample(plan, folder, load_tokenizer(plan.model, folder))
    except SurgError as error:
        show(replace(found, severity="warning") for found in error.diagnostics)
        return None
    show(reader.warnings)
    return found


def schema_text() -> str:
    """The JSON schema of plans; published as `docs/plan.schema.json`."""
    from surgery.compiler.plan import Plan

    return json.dumps(Plan.model_json_schema(), indent=2) + "\n"
