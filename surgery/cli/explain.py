"""`surgery explain`: what a diagnostic code means and how to fix it."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from typing import Annotated

import typer

from surgery.cli.common import Format, FormatOption, answer, output

EXAMPLE = "Example: surgery explain SURG020"
NEEDS_ARGUMENTS = False


def run(
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", help="SURG020, or 20; left out: the list", show_default=False)
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Explain a diagnostic: what it says, why it is one, an example, and how to fix it."""
    pages = {entry.name[:-3]: entry for entry in files("surgery.compiler").joinpath("codes").iterdir()
             if entry.name.endswith(".md")}  # fmt: skip
    if code is None:
        titles = {name: _title(pages[name].read_text(encoding="utf-8")) for name in sorted(pages)}
        if format is Format.json:
            answer({"codes": [{"code": name, "title": title} for name, title in titles.items()]})
        else:
            typer.echo("\n".join(f"{name}  {title}" for name, title in titles.items()))
        return
    match = re.fullmatch(r"(?:SURG)?(\d{1,3})", code.strip(), re.IGNORECASE)
    name = f"SURG{int(match.group(1)):03d}" if match else code
    if name not in pages:
        raise typer.BadParameter(f"there is no code {code}; `surgery explain` lists all", param_hint="CODE")
    page = pages[name].read_text(encoding="utf-8")
    if format is Format.json:
        answer({"code": name, "title": _title(page), "page": page})
    elif sys.stdout.isatty():
        from rich.markdown import Markdown

        output().print(Markdown(page))
    else:
        typer.echo(page, nl=False)


def _title(page: str) -> str:
    return page.partition("\n")[0].partition(": ")[2]
