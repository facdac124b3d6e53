"""`surgery methods`: the method library, with what is proved of each equation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from surgery.cli.common import Format, FormatOption, answer, note, output, reporting, write_text
from surgery.cli.method_pages import pages, sentences
from surgery.compiler.diagnostics import did_you_mean
from surgery.method_info import SIZE, MethodInfo

EXAMPLE = "Example: surgery methods delta_lora"
NEEDS_ARGUMENTS = False
NARROW = 140  # columns; below, a list says the same as the table
RANK = 20  # columns of a rank bound before it is wrapped
MARKS = {  # what is said of a method in the table: the fact, the value that is worth a word, and the word
    "identity_at_start": (False, "moved at start"),
    "merges": (False, "does not merge"),
    "exports_as_lora": (True, "exports as LoRA"),
    "keeps_zeros": (True, "keeps zeros"),
    "moves_base": (True, "moves W"),
    "needs_calibration": (True, "needs data"),
}
FACTS = (
    "identity_at_start",
    "rank_bound",
    "merges",
    "exports_as_lora",
    "keeps_zeros",
    "moves_base",
    "needs_calibration",
)


def run(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="one method; left out: all", show_default=False)
    ] = None,
    format: FormatOption = Format.text,
    write: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="write a page per method and a table", show_default=False)
    ] = None,
    specs: Annotated[Path, typer.Option(metavar="FOLDER", help="the specs that the pages link to")] = Path("specs"),
) -> None:
    """List the methods: equation, parameters, source, and the facts that the compiler proves."""
    with reporting(format):
        import surgery

        methods = list(surgery.methods())
        if write is not None:
            return _write(methods, write, specs)
        if name is not None:
            known = [method.name for method in methods]
            if name not in known:
                hint = did_you_mean(name, known) or "`surgery methods` lists all"
                raise typer.BadParameter(f"there is no method `{name}`; {hint}", param_hint="NAME")
            methods = [method for method in methods if method.name == name]
        if format is Format.json:
            answer({"methods": [as_json(method) for method in methods]})
        elif name is not None:
            _print_one(methods[0])
        else:
            _print_all(methods)


def as_json(method: MethodInfo) -> dict[str, Any]:
    """One entry of the public contract's `methods`."""
    facts = {fact: getattr(method, fact) for fact in FACTS}
    return {"name": method.name, "parameters": list(method.parameters), "equation": method.equation, **facts,
            "source": method.source}  # fmt: skip


def _write(methods: list[MethodInfo], folder: Path, specs: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = pages(methods, folder, specs)
    for path in set(folder.glob("*.md")) - {folder / file for file in found}:
        path.unlink()  # the page of a method that is gone
    for file, text in found.items():
        write_text(folder / file, text)
    note(f"{len(found)} pages in {folder}")


def _print_all(methods: list[MethodInfo]) -> None:
    console = output()
    if console.width < NARROW:
        for method in methods:
            bound = f"rank at most {method.rank_bound}" if method.rank_bound else "full rank"
            console.print(Text.assemble((method.name, "bold"), f": {method.what}"))
            said = ", ".join([bound, f"{method.trained:,} trained", *_marks(method)])
            for text, style in (*((part, "") for part in method.equation.split("; ")), (said, "dim")):
                console.print(Padding(Text(text, style=style), (0, 0, 0, 4)))
    else:
        console.print(_table(methods))
    console.print(Text(f"trained: numbers at one Linear of {SIZE} x {SIZE}, with the defaults"))
    console.print(Text("surgery methods NAME shows one, with its source"))


def _table(methods: list[MethodInfo]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("what it is, and what it computes", overflow="fold")
    table.add_column("rank", overflow="fold", max_width=RANK)
    table.add_column("trained", justify="right")
    table.add_column("facts", overflow="fold")
    for method in methods:
        about = Text.assemble(method.what, "\n", (method.equation.replace("; ", "\n"), "dim"))
        name = Text(method.name, style="bold")
        table.add_row(name, about, method.rank_bound or "full", f"{method.trained:,}", ", ".join(_marks(method)))
    return table


def _marks(method: MethodInfo) -> list[str]:
    return [mark for fact, (value, mark) in MARKS.items() if getattr(method, fact) is value]


def _print_one(method: MethodInfo) -> None:
    console = output()
    console.print(Text(method.text.rstrip()))
    console.print()
    for part in method.equation.split("; "):
        console.print(Text(part, style="bold"))
    for sentence in sentences(method):
        console.print(Text(f"* {sentence}"))
    console.print(Text(f"* {method.trained:,} numbers are trained at one Linear of {SIZE} x {SIZE} with the defaults."))
