"""`surgery plan`: what a spec does to its model, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.common import CodeOption, Format, FormatOption, output, pass_log, reporting, show, write_text

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
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of plans and exit")] = False,
    format: FormatOption = Format.text,
    allow_code: CodeOption = False,
) -> None:
    """Show the plan: each adapted weight, its method, the trained numbers, how it is run and why, and what is proved.

    Only the model's config is read, never its weights: planning a 70B model takes seconds and little memory.
    """
    with reporting(format), pass_log(verbose):
        if schema:
            typer.echo(schema_text(), nl=False)
            return
        if spec is None:
            raise typer.BadParameter("a SPEC is needed", param_hint="SPEC")
        import surgery
        from surgery.cli.plan_table import print_plan

        program = surgery.parse(spec)
        plan = surgery.plan(program, memory=memory, allow_code=allow_code)
        text = plan.model_dump_json(indent=2) + "\n"
        if write is not None:
            write_text(write, text)
        show(program.warnings)
        if format is Format.json:
            typer.echo(text, nl=False)
        else:
            print_plan(output(), plan, verbose)


def schema_text() -> str:
    """The JSON schema of plans; published as `docs/plan.schema.json`."""
    from surgery.compiler.plan import Plan

    return json.dumps(Plan.model_json_schema(), indent=2) + "\n"
