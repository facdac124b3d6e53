"""The plan on a terminal: a table of sites, equal ones folded into one row, then why, events and totals."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from surgery.cli.data_table import print_sample
from surgery.cli.folded import folded_path, without_numbers
from surgery.cli.plan_text import cells, fold, lines, lists, short_method, totals_text
from surgery.compiler.plan import Plan, Site, WholeParameter, way_text

NARROW = 140
UNBOUNDED = 10_000
NUMBERS = ("sites", "rank", "trained", "frozen")
COSTS = ("GFLOP", "MB moved", "MB kept")


def print_plan(console: Console, plan: Plan, verbose: bool = False) -> None:
    """Print a plan; with `verbose` every site has its row, and each way to run sites its cost."""
    model = plan.model
    task = f", {model.task}" + (f" with {model.labels} labels" if model.labels else "") if model.task else ""
    console.print(Text(f"{model.name}: {model.architecture}, {model.parameters:,} numbers{task}"))
    groups = [[site] for site in plan.sites] if verbose else fold(plan.sites)
    if groups:
        table = _sites(groups, console.width)
        if _natural(console, table) <= console.width:
            console.print(table)
        else:  # a path broken into pieces could not be read
            _print_list(console, groups)
    if plan.trained:
        console.print(_trained(plan, verbose))
    for title, said in lists(plan).items():
        _list(console, title, said)
    if verbose and plan.sites:
        _print_candidates(console, plan)
    print_sample(console, plan)
    for line in lines(plan, verbose):
        console.print(Text(line))
    if plan.memory is None:
        hint = "memory: not predicted; `--memory` runs the step on tensors without storage, which takes a while"
        console.print(Text(hint))
    console.print(Text(totals_text(plan), style="bold"))


def _natural(console: Console, table: Table) -> int:
    """The columns that a table takes where nothing is wrapped."""
    return console.measure(table, options=console.options.update_width(UNBOUNDED)).maximum


def _print_list(console: Console, groups: list[list[Site]]) -> None:
    console.print()
    for group in groups:
        row = cells(group)
        frozen = f", {row['frozen']} frozen" if any(member.frozen for member in group) else ""
        sites = f"{row['sites']} site{'s' * (len(group) > 1)} {row['shape']}"
        console.print(Text(row["path"], overflow="fold"))
        rank = "full rank" if row["rank"] == "full" else f"rank {row['rank']}"
        numbers = f"{row['method']}, {rank}, {row['trained']} trained{frozen}, {row['strategy']}"
        console.print(Padding(Text(f"{sites}: {numbers}"), (0, 0, 0, 2)))
    console.print()


def _sites(groups: list[list[Site]], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # A narrow terminal does without the kind, which is the end of the path.
    headers = ["path", "sites", "kind", "shape", "method", "rank", "trained", "frozen", "strategy"]
    shown = [header for header in headers if width >= NARROW or header != "kind"]
    for header in shown:
        table.add_column(header, justify="right" if header in NUMBERS else "left", overflow="fold")
    for group in groups:
        row = cells(group)
        table.add_row(*(Text(row[header]) for header in shown))
    return table


def _trained(plan: Plan, verbose: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("trained as it is", "shape", "numbers", "lr", "weight decay"):
        table.add_column(header, justify="right" if header == "numbers" else "left", overflow="fold")
    groups: dict[tuple[object, ...], list[WholeParameter]] = {}
    for whole in plan.trained:
        key = whole.name if verbose else without_numbers(whole.name)
        groups.setdefault((key, whole.shape, whole.lr, whole.weight_decay), []).append(whole)
    for group in groups.values():
        whole = group[0]
        shape = " x ".join(map(str, whole.shape)) or "1"
        rate, decay = ("" if value is None else f"{value:g}" for value in (whole.lr, whole.weight_decay))
        name, numbers = folded_path([member.name for member in group]), sum(member.numbers for member in group)
        table.add_row(*map(Text, (name, shape, f"{numbers:,}", rate, decay)))
    return table


def _list(console: Console, title: str, lines: Iterable[str]) -> None:
    entries = list(lines)
    if entries:
        console.print(Text(title))
        for entry in entries:
            console.print(Padding(Text(entry), (0, 0, 0, 2), expand=False))
        console.print()


def _print_candidates(console: Console, plan: Plan) -> None:
    """Every way to run a site, once for those that are alike; the numbers are what it adds to the frozen site."""
    title = f"ways to run, per site and {plan.tokens:,} tokens"
    ways = [(what, _ways(site)) for what, site in _alike(plan)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    for header in ("sites", "way", *COSTS, "legal", "reason"):
        table.add_column(header, justify="right" if header in COSTS else "left", overflow="fold")
    for what, rows in ways:
        for number, (name, costs, reason) in enumerate(rows):
            legal = "yes" if costs else "no"
            shown = ("" if number else what, name, *(costs or [""] * len(COSTS)), legal, reason)
            table.add_row(*map(Text, shown), end_section=number == len(rows) - 1)
    if _natural(console, table) <= console.width:
        return console.print(table)
    console.print(Text(title))
    for what, rows in ways:
        console.print(Padding(Text(what), (0, 0, 0, 2), expand=False))
        for name, costs, reason in rows:
            spelt = ", ".join(f"{cost} {header}" for cost, header in zip(costs, COSTS, strict=False)) or "not legal"
            console.print(Padding(Text(": ".join(filter(None, (name, spelt, reason)))), (0, 0, 0, 4), expand=False))
    console.print()
    return None


def _alike(plan: Plan) -> list[tuple[str, Site]]:
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in plan.sites:
        key = (short_method(site.method), site.shape, site.candidates, site.strategy, site.reason)
        groups.setdefault(key, []).append(site)
    found = []
    for members in groups.values():
        site, count = members[0], f"{len(members)} site{'s' * (len(members) > 1)}"
        found.append((f"{short_method(site.method)}, {site.shape[0]} x {site.shape[1]} ({count})", site))
    return found


def _ways(site: Site) -> list[tuple[str, list[str], str]]:
    """Name, costs (none of a way that is not legal) and reason of every way."""
    found = []
    for way in site.candidates:
        costs = [f"{way.flops / 1e9:,.3f}", f"{way.bytes / 1e6:,.3f}", f"{way.kept / 1e6:,.3f}"] if way.legal else []
        chosen = way.strategy == site.strategy
        name = way_text(way.strategy, way.operation) + (" (chosen)" if chosen else "")
        found.append((name, costs, site.reason if chosen else way.reason))
    return found
