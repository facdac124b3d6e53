"""A comparison of two models for people: a row for weights that differ in nothing but numbers in their names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgery.cli.folded import folded_path

if TYPE_CHECKING:
    from surgery.analysis.compare import Comparison
    from surgery.analysis.rows import Row

RIGHT = ("weights", "change", "rank", "suffices", "chosen", "left", "reached", "layers")


def print_comparison(console: Console, found: Comparison, verbose: bool = False) -> None:
    """Print the weights, the groups, and what was left out; with `verbose` every weight has its row."""
    wanted = found.wanted
    share = f"{wanted.tolerance:g}" if wanted.absolute else f"{wanted.tolerance:g} of the change"
    console.print(Text(f"{found.base} -> {found.target}: {wanted.norm} norm, tolerance {share}"))
    changed = [row for row in found.weights if row.size]
    if changed:
        console.print(_weights(_folded(changed, verbose), found))
    if groups := [row for row in found.groups if row.size]:
        console.print(_groups(groups, found))
    for line in lines(found):
        console.print(Text(line))


def lines(found: Comparison) -> list[str]:
    """What the tables do not say."""
    said = []
    for kind, same in (("weight", found.weights), ("product", found.groups)):
        if count := sum(row.size == 0 for row in same):
            said.append(f"{_counted(count, kind)} did not change")
    if noisy := sum(row.limited for row in (*found.weights, *found.groups)):
        where = _counted(noisy, "row")
        said.append(f"* in {where} the tolerance is below what rounding adds: ranks above theirs would fit noise")
    reasons = Counter((left.reason, left.changed) for left in found.left_out)
    for (reason, changed), count in reasons.items():
        state = {True: ", changed", False: ", the same in both", None: ""}[changed]
        said.append(f"left out: {_counted(count, 'tensor')}{state}: {reason}")
    rows = [row for row in found.weights if row.size and row.chosen]
    if rows:
        numbers = sum(_numbers(row) for row in rows)
        full = sum(math.prod(row.shape) for row in rows)
        said.append(f"adapters of the chosen ranks: {numbers:,} numbers for {full:,} that changed")
    return said


def _numbers(row: Row) -> int:
    """Of a pair of factors, or one for each expert."""
    return row.chosen * sum(row.shape[-2:]) * math.prod(row.shape[:-2])


def _counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _folded(rows: Sequence[Row], verbose: bool) -> list[list[Row]]:
    groups: dict[object, list[Row]] = {}
    for row in rows:
        key = row.name if verbose else (re.sub(r"(?<![^.])\d+(?![^.])", "#", row.name), row.shape)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _weights(groups: Sequence[Sequence[Row]], found: Comparison) -> Table:
    table = _table("weight", "weights", "shape", "change", "rank", "suffices", *_chosen(found), "left")
    for rows in groups:
        path = folded_path([row.name.removesuffix(".weight") for row in rows])
        sizes = " x ".join(map(str, rows[0].shape))
        table.add_row(*map(Text, (path, str(len(rows)), sizes, *_figures(rows, found))))
    return table


def _groups(rows: Sequence[Row], found: Comparison) -> Table:
    table = _table("product", "layers", "shape", "change", "rank", "suffices", *_chosen(found), "left", "reached")
    for row in rows:
        assert row.reached is not None
        sizes = " x ".join(map(str, row.shape))
        reached = _share(row.reached, row.size) if row.attained else f"{_share(row.reached, row.size)}, not attained"
        table.add_row(*map(Text, (row.name, str(row.layers), sizes, *_figures([row], found), reached)))
    return table


def _chosen(found: Comparison) -> list[str]:
    """The column of a rank that was asked for; without one it would repeat what suffices."""
    return [] if found.wanted.rank is None else ["chosen"]


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in RIGHT else "left", overflow="fold")
    return table


def _figures(rows: Sequence[Row], found: Comparison) -> list[str]:
    """How far, which ranks, and what is left: of several rows the least and the most."""
    star = "*" * any(row.limited for row in rows)
    chosen = [] if found.wanted.rank is None else [_range(rows, lambda row: row.chosen, str)]
    return [
        _range(rows, lambda row: row.share, lambda share: f"{share:.2%}"),
        _range(rows, lambda row: row.rank, str),
        _range(rows, lambda row: row.suffices, str) + star,
        *chosen,
        _range(rows, lambda row: row.error / row.size if row.size else 0.0, lambda share: f"{share:.2g}"),
    ]


def _share(value: float, size: float) -> str:
    return f"{value / size if size else 0.0:.2g}"


def _range(rows: Sequence[Row], figure: Callable[[Row], float], written: Callable[[float], str]) -> str:
    figures = [figure(row) for row in rows]
    least, most = written(min(figures)), written(max(figures))
    return least if least == most else f"{least} - {most}"
