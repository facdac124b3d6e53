"""`surgery methods`: the method library, with what is proved of each equation."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from surgery.cli.common import Format, FormatOption, answer, output, reporting
from surgery.compiler.diagnostics import did_you_mean

EXAMPLE = "Example: surgery methods delta_lora"
NEEDS_ARGUMENTS = False
NARROW = 140  # columns; below, a list says the same as the table
MARKS = {
    "merges": "merges",
    "exports_as_lora": "exports as LoRA",
    "keeps_zeros": "keeps zeros",
    "moves_base": "moves W",
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
) -> None:
    """List the methods: equation, parameters, source, and the facts that the compiler proves."""
    with reporting(format):
        import surgery

        methods = list(surgery.methods())
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


def as_json(method: Any) -> dict[str, Any]:
    """One entry of the public contract's `methods`."""
    facts = {fact: getattr(method, fact) for fact in FACTS}
    return {"name": method.name, "parameters": list(method.parameters), "equation": method.equation, **facts,
            "source": method.source}  # fmt: skip


def _print_all(methods: list[Any]) -> None:
    console = output()
    if console.width < NARROW:
        _print_list(console, methods)
    else:
        console.print(_table(methods))
    console.print(Text("surgery methods NAME shows one, with its source"))


def _print_list(console: Console, methods: list[Any]) -> None:
    for method in methods:
        start = "identity at start" if method.identity_at_start else "changes the model at the start"
        marks = [mark for fact, mark in MARKS.items() if getattr(method, fact)]
        console.print(Text(_signature(method), style="bold"))
        rank = f"rank at most {method.rank_bound}" if method.rank_bound else "full rank"
        lines = (*method.equation.split("; "), ", ".join([start, rank, *marks]))
        for text, style in [*((line, "") for line in lines), (method.source, "dim")]:
            console.print(Padding(Text(text, style=style), (0, 0, 0, 2)))
        console.print()


def _table(methods: list[Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, leading=1)
    for header in ("method", "equation, source", "identity at start", "rank", "merges", "LoRA", "zeros", "moves W"):
        table.add_column(header, overflow="fold")
    for method in methods:
        marks = ("yes" if getattr(method, fact) else "no" for fact in FACTS[2:6])
        start = "yes" if method.identity_at_start else "no"
        equation = Text.assemble(method.equation.replace("; ", "\n"), ("\n" + method.source, "dim"))
        cells = (_signature(method).replace("(", "(\n  ", 1), start, str(method.rank_bound or "full"), *marks)
        table.add_row(Text(cells[0]), equation, *map(Text, cells[1:]))
    return table


def _print_one(method: Any) -> None:
    console = output()
    console.print(Text(method.text.rstrip()))
    console.print()
    console.print(Text(f"computes      {method.equation}"))
    for fact in FACTS:
        value = getattr(method, fact)
        shown = str(value or "full") if fact == "rank_bound" else "yes" if value else "no"
        console.print(Text(f"{fact.replace('_', ' '):<18}{shown}"))


def _signature(method: Any) -> str:
    return f"{method.name}({', '.join(method.parameters)})"
