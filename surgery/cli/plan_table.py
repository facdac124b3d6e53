"""The plan for people: a table of sites, equal ones folded into one row, then why, events and totals."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from surgery.cli.data_table import print_sample
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.measured import gain
from surgery.compiler.algebra.telescope import why_not
from surgery.compiler.plan import EventPlan, Facts, Plan, QuantizedPlan, Site, StepPlan, WholeParameter, way_text
from surgery.optimizers import OPTIMIZERS

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


def lists(plan: Plan) -> dict[str, list[str]]:
    """What is said of a plan's sites together, by its title."""
    return {
        "equations": _equations(plan),
        "events": list(dict.fromkeys(_event(plan, event) for event in plan.events)),
        "facts": _counted((site.method, facts_text(site.facts)) for site in plan.sites),
        "why": _counted((site.strategy, site.reason) for site in plan.sites),
    }


def lines(plan: Plan, verbose: bool = False) -> list[str]:
    """How a plan's step runs: one line for each thing there is to say."""
    rounded = [_rounded(plan)] if plan.rounds else []
    recompute = [_recompute(plan)] if plan.recomputed else []
    quantized = [_quantized(plan.quantized)] if plan.quantized else []
    return [
        *_steps(plan),
        *_active(plan),
        *measured_lines(plan, verbose),
        *_full_size(plan),
        *quantized,
        *rounded,
        *recompute,
        *_memory(plan, verbose),
    ]


def _event(plan: Plan, event: EventPlan) -> str:
    more = ""
    if event.update == "literal" and plan.formulas[event.formula].from_start:
        more = ", each time from W at the start of the run, which stays in memory"
    elif event.update == "literal" and (reason := why_not(instance(plan, event.formula))):
        more = f": its sum does not telescope, {reason}"
    if event.update == "mask":
        more = ": tensors keep their largest shape, and what scales them"
    return f"{event.text}  ({event.update}{more})"


def fold(sites: Iterable[Site]) -> list[list[Site]]:
    """Groups of sites that differ in nothing but numbers in their paths, in the order of their first site."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        key = (_without_numbers(site.path), shape_text(site), site.method, site.rank,
               site.trainable, site.frozen, site.strategy, site.reason, site.update, site.facts)  # fmt: skip
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _natural(console: Console, table: Table) -> int:
    """The columns that a table takes where nothing is wrapped."""
    return console.measure(table, options=console.options.update_width(UNBOUNDED)).maximum


def _without_numbers(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", path)


def folded_path(paths: Sequence[str]) -> str:
    """One pattern for paths that differ in numbers: `encoder.layer.[0..5].output`, `layers.{1,5}.mlp`."""
    columns = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(_component(list(dict.fromkeys(column))) for column in columns)


def _component(values: list[str]) -> str:
    if len(values) == 1:
        return values[0]
    numbers = sorted(map(int, values))
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"[{numbers[0]}..{numbers[-1]}]"
    return "{" + ",".join(map(str, numbers)) + "}"


def facts_text(facts: Facts) -> str:
    """The proved facts in a few words."""
    words = [
        "identity at start" if facts.identity_at_start else "changes the model at the start",
        f"rank <= {facts.rank_bound}" if facts.rank_bound is not None else "full rank",
        "merges" if facts.merges else f"does not merge: {facts.merge_reason}",
    ]
    optional = {
        "exports as LoRA": facts.exports_as_lora,
        "keeps zeros": facts.keeps_zeros,
        "moves W": facts.moves_base,
        "needs dense W": facts.needs_dense_weight,
        "needs calibration data": facts.needs_calibration,
    }
    return ", ".join(words + [word for word, holds in optional.items() if holds])


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


def cells(group: list[Site]) -> dict[str, str]:
    """The row of a group that `fold` made, by the titles of its columns."""
    site = group[0]
    return {
        "path": folded_path([member.path for member in group]),
        "sites": str(len(group)),
        "kind": site.kind,
        "shape": shape_text(site),
        "method": short_method(site.method),
        "rank": "full" if site.facts.rank_bound is None else str(site.facts.rank_bound),
        "trained": f"{sum(member.trainable for member in group):,}",
        "frozen": f"{sum(member.frozen for member in group):,}",
        "strategy": site.strategy if site.update == "none" else f"{site.strategy}, {site.update}",
    }


def short_method(method: str) -> str:
    """A method or a composition without the arguments: `mask(W) * lora + circulant`."""
    return re.sub(r"\((\w+ = [^()]*)?\)", "", method)


def shape_text(site: Site) -> str:
    """W's sizes, `[experts, ] out x in`, and its kind where that is no Linear."""
    sizes = " x ".join(str(size) for size in (site.experts, *site.shape) if size is not None)
    return sizes if site.module_class == "Linear" else f"{sizes} ({site.module_class})"


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
        key = whole.name if verbose else _without_numbers(whole.name)
        groups.setdefault((key, whole.shape, whole.lr, whole.weight_decay), []).append(whole)
    for group in groups.values():
        whole = group[0]
        shape = " x ".join(map(str, whole.shape)) or "1"
        rate, decay = ("" if value is None else f"{value:g}" for value in (whole.lr, whole.weight_decay))
        name, numbers = folded_path([member.name for member in group]), sum(member.numbers for member in group)
        table.add_row(*map(Text, (name, shape, f"{numbers:,}", rate, decay)))
    return table


def _equations(plan: Plan) -> list[str]:
    sizes: dict[str, list[str]] = {}
    for formula in plan.formulas.values():
        composed = formula.equation == f"delta = {formula.method}"  # a composition is its own name
        name = "" if composed else f"{formula.method}: "
        shapes = sizes.setdefault(name + formula.equation, [])
        shapes.append(f"{formula.outputs} x {formula.inputs}")
    found = []
    for equation, shapes in sizes.items():
        spelt = equation.replace(": ", ":\n  ", 1) if "; " in equation else equation  # several steps: a line for each
        found.append(f"{spelt}  [{', '.join(dict.fromkeys(shapes))}]".replace("; ", "\n  "))
    return found


def _counted(pairs: Iterable[tuple[str, str]]) -> list[str]:
    counts = Counter(pairs)
    return [f"{what} ({count} site{'s' * (count > 1)}): {said}" for (what, said), count in counts.items()]


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


def _steps(plan: Plan) -> list[str]:
    """How the steps run; of several blocks also what each of them moves."""
    if not plan.later:
        return [f"step: {_step(plan.step)}"]
    found = []
    for block in plan.blocks:
        number = block.step.number + 1
        found.append(f"step {number} of {len(plan.later) + 1}: {_step(block.step)}")
        names = [tensor.key for site in block.sites for tensor in site.tensors if tensor.role == "train"]
        names += [whole.name for whole in block.trained]
        found.append(f"  moves {_names(names)}" if block.step.frozen else "  moves all that is trained")
    return found


def _names(names: Iterable[str]) -> str:
    """Names of tensors, those that differ in numbers folded into one."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(_without_numbers(name), []).append(name)
    return ", ".join(map(folded_path, groups.values()))


def _step(step: StepPlan) -> str:
    around = OPTIMIZERS[step.optimizer.name].around
    optimizer = f"{step.optimizer.base if around else step.optimizer.name}(lr = {step.optimizer.lr:g})"
    if around:
        optimizer = f"{step.optimizer.name} around {optimizer}"
    length = f"{step.steps} steps" if step.steps is not None else f"{step.epochs or 1:g} epochs"
    pieces = f" in micro-batches of {step.micro_batch}" if step.micro_batch else ""
    return f"{length} of batch {step.batch}{pieces}, {optimizer}, {step.schedule.name} schedule, seed {step.seed}"


def _active(plan: Plan) -> list[str]:
    return [
        f"active: {one.count} of the {one.sites} weights of rule {one.rule + 1} learn at a time, "
        f"others after every {one.every} steps"
        for one in plan.active
    ]


def measured_lines(plan: Plan, verbose: bool = False) -> list[str]:
    """The numbers of the data by the blocks that have them, and with `verbose` what they follow from."""
    found = []
    for one in plan.measured:
        alike: dict[int, list[str]] = {}
        for path, dimensions in one.blocks.items():
            alike.setdefault(gain(*dimensions), []).append(path)
        numbers = ", ".join(f"{number} in {_blocks(alike[number])}" for number in sorted(alike))
        found.append(f"{one.call}, measured on {one.rows:,} rows: {numbers}")
        if verbose:
            found += [f"  {path}: hidden states of dimension {before:.1f}, behind it {after:.1f}"
                      for path, (before, after) in one.blocks.items()]  # fmt: skip
    return found


def _full_size(plan: Plan) -> list[str]:
    """What optimizers keep of the size of whole weights."""
    return list(dict.fromkeys(line for block in plan.blocks for line in _full_size_of(block)))


def _full_size_of(plan: Plan) -> list[str]:
    optimizer = plan.step.optimizer
    count = OPTIMIZERS[optimizer.name].moments.get(optimizer.base, 0)
    if not count:
        return []
    sites = {site.path: site for site in plan.sites}
    size = 0
    for product in plan.factors:
        site = sites[product.site]
        width = 8 if any(tensor.dtype == "float64" for tensor in site.tensors) else 4
        size += count * site.shape[0] * site.shape[1] * (site.experts or 1) * width
    spelt = f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.3f} MiB"
    return [f"{optimizer.name} keeps {count} moments of the full size of each of {len(plan.factors)} products: {spelt}"]


def _recompute(plan: Plan) -> str:
    setting, count = plan.step.recompute, len(plan.recomputed)
    spelt = f"budget({setting.share:g})" if setting.name == "budget" else setting.name
    return f"recompute: {spelt}, the backward runs {count} block{'s' * (count > 1)} again: {_blocks(plan.recomputed)}"


def _blocks(paths: Sequence[str]) -> str:
    """Paths of blocks, those of one list folded."""
    lists: dict[str, list[str]] = {}
    for path in paths:
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    return ", ".join(map(folded_path, lists.values()))


def _memory(plan: Plan, verbose: bool) -> list[str]:
    """What a step takes, on one line, and with `verbose` what each block keeps."""
    found = plan.memory
    if found is None:
        return []
    unit, name = (2**30, "GiB") if found.peak >= 2**30 else (2**20, "MiB")

    def said(size: int) -> str:
        return f"{size / unit:,.2f}"

    gathered = f" and {said(found.gathered)} gathered from others" if found.gathered else ""
    parts = (
        f"weights {said(found.weights)}{gathered}, trained {said(found.trained)} with gradients "
        f"{said(found.gradients)} and optimizer {said(found.optimizer)}, kept by blocks {said(found.kept)}, "
        f"around them with logits and loss {said(found.outputs)}, backward {said(found.backward)}"
    )
    how = "compiled" if found.compiled else "not compiled"
    each = f" on each of {found.processes} GPUs" if found.processes > 1 else ""
    lines = [f"memory: {said(found.peak)} {name}{each} at the peak of {found.rows} x {found.length}, {how}: {parts}"]
    alike: dict[int, list[str]] = {}
    for path, size in found.blocks.items() if verbose else ():
        alike.setdefault(size, []).append(path)
    return lines + [
        f"  {_blocks(paths)}: {said(size)} {name}{' each' * (len(paths) > 1)}" for size, paths in alike.items()
    ]


def _quantized(found: QuantizedPlan) -> str:
    weights = f"{len(found.weights)} frozen weights, {found.numbers:,} numbers"
    return f"base: {weights}, in {found.kind}: {found.bytes:,} bytes instead of {found.dense_bytes:,}"


def _rounded(plan: Plan) -> str:
    """What is trained in bfloat16; the optimizer's state is float32."""
    own = any(tensor.dtype == "bfloat16" for site in plan.sites for tensor in site.tensors if tensor.role == "train")
    whole = any(parameter.dtype == "bfloat16" for parameter in plan.trained)
    what = " and ".join(["adapters"] * own + ["whole parameters"] * whole)
    return f"{what} in bfloat16, rounded stochastically; the optimizer's state is float32"


def totals_text(plan: Plan) -> str:
    """The sums over a plan."""
    totals = plan.totals
    trained = f"{totals.trainable:,} numbers trained, {totals.share:.3%} of the model's {totals.model:,}"
    frozen = f", {totals.frozen:,} frozen ones added" if totals.frozen else ""
    return f"total: {totals.sites} sites, {trained}{frozen}"
