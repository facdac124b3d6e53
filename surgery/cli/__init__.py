"""The command line: `surgery VERB`. One file per verb; torch is imported only by the verbs that need it."""

from __future__ import annotations

import sys

import typer

from surgery.cli import (
    check,
    compile,
    eval,
    explain,
    export,
    fmt,
    generate,
    import_,
    merge,
    methods,
    plan,
    rank,
    report,
    train,
)
from surgery.cli.common import options

app = typer.Typer(
    name="surgery",
    help="Adapt PyTorch models with a few declarative lines: write a .surg file, see the plan, train it, merge it.",
    epilog="Start with `surgery plan specs/demo.surg`, then `surgery train specs/demo.surg -o runs/demo`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for verb in (check, plan, compile, train, eval, generate, report, rank, merge, export, import_, methods, fmt, explain):
    name = verb.__name__.rpartition(".")[2].removesuffix("_")  # `import` is a word of Python
    app.command(name, epilog=verb.EXAMPLE, no_args_is_help=verb.NEEDS_ARGUMENTS)(verb.run)
app.callback()(options)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 fine, 1 diagnostics, 2 usage, 130 interrupted."""
    try:
        app(args=arguments, prog_name="surgery")
    except KeyboardInterrupt:
        sys.exit(130)
