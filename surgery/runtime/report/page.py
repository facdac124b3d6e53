"""A report as one HTML page that needs nothing else: no network, no script, its style and plots inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import median

from surgery.cli.plan_text import cells, fold, lines, lists, totals_text
from surgery.compiler.plan import Plan, Site
from surgery.runtime.report.changes import Change
from surgery.runtime.report.gather import Report
from surgery.runtime.report.markup import Markup, tag
from surgery.runtime.report.metrics import Series
from surgery.runtime.report.style import STYLE
from surgery.runtime.report.svg import heat_map, line_chart, number, running_mean, window

TITLES = {"lr": "Learning rate", "seconds": "Seconds per step", "tokens": "Tokens per step"}
MOST_LINES = 6  # of one chart: more of them, such as a rank for each site, are rows of a heat map over time
MOMENTS = 24  # columns of such a heat map
# Nothing may be loaded or run, whatever a spec or a name in it says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
FIGURES = {
    "relative": ("‖ΔW‖ / ‖W‖", "Frobenius norms: how far the weight moved, as a share of its own size"),
    "norm": ("‖ΔW‖", "Frobenius norm of the change"),
    "effective_rank": ("Effective rank of ΔW", "exp of the entropy of its singular values: how many directions it has"),
    "largest": ("Largest singular value of ΔW", "the most that the change does to an input of length 1"),
}


def page(report: Report) -> str:
    """The whole page."""
    title = f"{Path(report.plan.file).name} on {report.plan.model.name or 'a given model'}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", f"{title}: report"),
        tag("style", Markup(STYLE)),
    )
    sections = (_header(report, title), _training(report), _changes(report), _plan(report.plan), _spec(report))
    body = tag("body", tag("main", *sections))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _section(name: str, title: str, *parts: str) -> Markup:
    return tag("section", tag("h2", title), *parts, id=name)


# --- the run ----------------------------------------------------------------------------------------------------------


def _header(report: Report, title: str) -> Markup:
    of = "" if report.steps is None else f" of {report.steps:,}"
    best = report.best
    state = "finished" if report.finished else "not finished"
    if best is not None and best.over:
        of += f", ended early: {best.patience} evaluations in a row were no better"
    parts = [
        tag("h1", title),
        tag("p", report.run, class_="soft"),
        tag("p", f"{state}: step {report.step:,}{of}", class_=f"state {'good' if report.finished else 'wait'}"),
    ]
    if best is not None and best.value is not None:
        parts.append(tag("p", f"best held-out {best.score}: {number(best.value)}, after step {best.steps:,}"))
    if report.logged > report.step:
        behind = f"{report.logged:,} steps wrote their numbers down, {report.step:,} are in the last save"
        below = ": the weights below are of that save" if report.weights_step == report.step else ""
        parts.append(tag("p", f"{behind}{below}.", class_="notice"))
    if report.weights_step != report.step:
        parts.append(
            tag("p", f"The weights below are as they were after step {report.weights_step:,}.", class_="notice")
        )
    return tag("header", *parts, tag("div", *_tiles(report), class_="tiles"))


def _tiles(report: Report) -> list[Markup]:
    plan, series = report.plan, report.series
    shown = [(_title(name), number(found.last)) for name, found in series.items() if name == "loss" or _scores(name)]
    if "seconds" in series:
        seconds = series["seconds"].values
        shown += [("Seconds per step (median)", number(median(seconds))), ("In all steps", _duration(sum(seconds)))]
        if "tokens" in series and (spent := sum(seconds)):
            shown.append(("Tokens per second", number(sum(series["tokens"].values) / spent)))
    shown += [("Sites", f"{plan.totals.sites:,}"), ("Numbers trained", f"{plan.totals.trainable:,}"),
              ("Of the model", f"{plan.totals.share:.3%}")]  # fmt: skip
    return [tag("div", tag("b", value), tag("span", name), class_="tile") for name, value in shown]


def _scores(name: str) -> bool:
    return name.startswith("eval_")


def _title(name: str) -> str:
    """A series for people: `eval_f1` is the held-out f1."""
    return (f"held-out {name.removeprefix('eval_')}" if _scores(name) else name).replace("_", " ").capitalize()


def _duration(seconds: float) -> str:
    minutes, hours = divmod(round(seconds / 60), 60)[::-1] if seconds >= 3600 else (0, 0)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _training(report: Report) -> Markup:
    if not report.series:
        return _section("training", "Training", tag("p", "No step has written its numbers down yet.", class_="none"))
    cards = [_chart(name, members, report.logged) for name, members in charts(report.series)]
    return _section("training", "Training", tag("div", *cards, class_="charts"))


def charts(series: dict[str, Series]) -> list[tuple[str, list[Series]]]:
    """The series of each plot: `eval_loss` with `loss`, and those of one object together."""
    found: dict[str, list[Series]] = {}
    for name, one in series.items():
        trained = name.removeprefix("eval_") if _scores(name) else ""
        found.setdefault(trained if trained in series else name.partition("/")[0], []).append(one)
    return list(found.items())


def _chart(name: str, members: Sequence[Series], steps: int) -> Markup:
    title = TITLES.get(name) or _title(name)
    if len(members) > MOST_LINES:
        return tag("div", tag("h3", title), tag("div", _over_time(title, members), class_="scroll"), class_="card wide")
    legend = [tag("li", tag("span", _legend(one)), class_=f"tone{place % 8}") for place, one in enumerate(members)]
    return tag(
        "div", tag("h3", title), line_chart(title, members, steps), tag("ul", *legend, class_="legend"), class_="card"
    )


def _legend(line: Series) -> str:
    points = [point for point in zip(line.steps, line.values, strict=True) if math.isfinite(point[1])]
    mean = f", with the mean of {window(len(points))} values" if running_mean(points) else ""
    return f"{line.name}{mean}: {number(line.last)}"


def _over_time(title: str, members: Sequence[Series]) -> Markup:
    """A row for each series, and columns for moments of the run: the value as it was then."""
    steps = sorted({step for one in members for step in one.steps})
    moments = steps[:: math.ceil(len(steps) / MOMENTS)]
    values = {}
    for one in members:
        for moment in moments:
            known = [value for step, value in zip(one.steps, one.values, strict=True) if step <= moment]
            if known:
                values[_key(one), str(moment)] = known[-1]
    return heat_map(title, [_key(one) for one in members], [str(moment) for moment in moments], values)


def _key(line: Series) -> str:
    return line.name.partition("/")[2] or line.name


# --- what it did to the weights ---------------------------------------------------------------------------------------


def _changes(report: Report) -> Markup:
    notice, parts = "", list[str]()
    if report.unreached:
        lacking = "The model's own weights are not here: nothing is relative to them, and only changes are known that"
        notice = tag("p", f"{lacking} do not depend on them. {report.unreached}", class_="notice")
    stacks: dict[str, list[Change]] = {}
    for change in report.changes:
        if change.layer is not None:
            stacks.setdefault(change.stack, []).append(change)
    for stack, members in stacks.items():
        for figure, (name, meaning) in FIGURES.items():
            title = f"{name}, {stack}" if len(stacks) > 1 else name
            if figure != "norm" or report.unreached:
                parts += _map(title, meaning, [(change, getattr(change, figure)) for change in members])
    title = f"Change of the weights, after step {report.weights_step:,}"
    return _section("changes", title, notice, tag("div", *parts, class_="maps"), _table(report.changes))


def _map(title: str, meaning: str, figures: Sequence[tuple[Change, float | None]]) -> list[Markup]:
    values = {(change.kind, str(change.layer)): value for change, value in figures if value is not None}
    if not values:
        return []
    rows = [
        kind for kind in dict.fromkeys(change.kind for change, _ in figures) if any(kind == row for row, _ in values)
    ]
    columns = [str(layer) for layer in sorted({change.layer for change, _ in figures if change.layer is not None})]
    said = tag(
        "p", f"{meaning}; a column for each layer, the deepest colour is {number(max(values.values()))}.", class_="soft"
    )
    drawn = tag("div", heat_map(title, rows, columns, values), class_="scroll")
    return [tag("div", tag("h3", title), said, drawn, class_="card")]


def _table(found: Sequence[Change]) -> Markup:
    names = {"relative": "‖ΔW‖ / ‖W‖", "norm": "‖ΔW‖", "effective_rank": "effective rank", "largest": "largest σ"}
    header = tag(
        "tr", tag("th", "weight"), tag("th", "shape"), *(tag("th", name, class_="n") for name in names.values())
    )
    rows = []
    for change in found:
        shape = " x ".join(map(str, change.shape)) or "1"
        figures = [getattr(change, name) for name in names]
        numbers = [tag("td", "–" if value is None else number(value), class_="n") for value in figures]
        path = [change.path, *([tag("div", change.note, class_="why")] if change.note else [])]
        rows.append(tag("tr", tag("td", *path, class_="p"), tag("td", shape, class_="p"), *numbers))
    table = tag("table", tag("thead", header), tag("tbody", *rows))
    label = f"Every weight ({len(found)})"
    return tag("details", tag("summary", label), tag("div", table, class_="scroll"), class_="card")


# --- what was planned -------------------------------------------------------------------------------------------------


def _plan(plan: Plan) -> Markup:
    parts: list[str] = [tag("p", totals_text(plan))]
    if plan.sites:
        parts.append(tag("div", tag("div", _sites(plan), class_="scroll"), class_="card"))
    for title, said in lists(plan).items():
        if said:
            parts.append(tag("div", tag("h3", title.capitalize()), tag("pre", "\n".join(said)), class_="card"))
    parts.append(tag("div", tag("h3", "Step"), tag("pre", "\n".join(lines(plan))), class_="card"))
    return _section("plan", "Plan", tag("div", *parts, class_="stack"))


def _sites(plan: Plan) -> Markup:
    """Sites by rule, those of one kind in one row; then what is trained as it is."""
    numbers = ("sites", "rank", "trained", "frozen")
    names = ("path", "sites", "shape", "method", "rank", "trained", "frozen", "strategy")
    header = tag("tr", *(_cell("th", name, name, numbers) for name in names))
    bodies = []
    for _, found in groupby(sorted(plan.sites, key=lambda site: site.rule), key=lambda site: site.rule):
        members = list(found)
        first = tag("tr", tag("th", _rule(plan, members[0]), colspan=len(names), scope="rowgroup"))
        rows = [
            tag("tr", *(_cell("td", name, row[name], numbers) for name in names)) for row in map(cells, fold(members))
        ]
        bodies.append(tag("tbody", first, *rows))
    if plan.trained:
        rows = [tag("tr", tag("td", whole.name, class_="p"), tag("td", "1", class_="n"),
                    tag("td", " x ".join(map(str, whole.shape)) or "1"), tag("td", "as it is"), tag("td"),
                    tag("td", f"{whole.numbers:,}", class_="n"), tag("td"), tag("td"))
                for whole in plan.trained]  # fmt: skip
        bodies.append(tag("tbody", tag("tr", tag("th", "train", colspan=len(names), scope="rowgroup")), *rows))
    return tag("table", tag("thead", header), *bodies)


def _cell(kind: str, name: str, value: str, numbers: Sequence[str]) -> Markup:
    classes = {"class_": "n"} if name in numbers else {"class_": "p"} if name == "path" and kind == "td" else {}
    return tag(kind, value, **classes)


def _rule(plan: Plan, site: Site) -> str:
    """The first line of a site's rule, as it stands in the spec."""
    lines_of = plan.spec.splitlines()
    text = lines_of[site.place.line - 1].strip() if site.place.line <= len(lines_of) else ""
    return f"line {site.place.line}: {text}" if site.place.file == plan.file and text else f"rule {site.rule + 1}"


def _spec(report: Report) -> Markup:
    return _section("spec", "Spec", tag("div", tag("pre", report.spec.rstrip()), class_="card"))
