"""`surgery fmt`: the one way to lay a spec out."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.common import Format, FormatOption, answer, as_json, note, reporting, write_text
from surgery.compiler.diagnostics import Diagnostic, SurgError, fail
from surgery.compiler.span import Source

EXAMPLE = "Example: surgery fmt specs/*.surg, or surgery fmt - < in.surg > out.surg"
NEEDS_ARGUMENTS = True


def run(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES", help=".surg files, or - for standard input", show_default=False)
    ],
    check: Annotated[bool, typer.Option("--check", help="change nothing; exit 1 if a file would change")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="change nothing; print what would change")] = False,
    format: FormatOption = Format.text,
) -> None:
    """Format specs in place. Comments stay, and formatting twice changes nothing."""
    from surgery.compiler.source import read

    changed: list[str] = []
    with reporting(format):
        found: list[Diagnostic] = []
        for file in files:
            try:
                source = _standard_input() if str(file) == "-" else read(file)
                text = formatted(source)
            except SurgError as error:  # the other files are formatted all the same
                found += error.diagnostics
                continue
            if text != source.text:
                changed.append(str(file))
            if diff:
                _print_diff(source, text, format)
            elif str(file) == "-" and not check:
                if format is Format.text:
                    sys.stdout.write(text)
            elif text != source.text and not check:
                write_text(file, text)
        if found:
            raise SurgError(found)
    if format is Format.json:
        answer({**as_json(()), "changed": changed})
    else:
        for name in changed if check or diff else [name for name in changed if name != "-"]:
            note(f"{name}: {'would be formatted' if check or diff else 'formatted'}")
    if changed and check:
        raise typer.Exit(1)


def formatted(source: Source) -> str:
    """The text of a source as the printer lays it out; raises `SurgError` for syntax errors."""
    from surgery.compiler import p1_parse, printer

    return printer.show(p1_parse.run(source))


def _standard_input() -> Source:
    try:
        return Source("standard input", sys.stdin.buffer.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise fail("SURG011", f"standard input is not UTF-8 text: {error}") from error


def _print_diff(source: Source, text: str, format: Format) -> None:
    if format is Format.json:
        return
    lines = difflib.unified_diff(
        source.text.splitlines(keepends=True), text.splitlines(keepends=True), source.name, f"{source.name} (formatted)"
    )
    sys.stdout.writelines(line if line.endswith("\n") else f"{line}\n\\ no newline at the end\n" for line in lines)
