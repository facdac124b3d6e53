"""What a plan says, as text: for the terminal and for the page of a report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from surgery.cli.folded import folded_path, without_numbers
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.measured import gain
from surgery.compiler.algebra.names import FORMS
from surgery.compiler.algebra.telescope import why_not
from surgery.compiler.plan import EventPlan, Facts, Plan, QuantizedPlan, Site, StepPlan
from surgery.optimizers import OPTIMIZERS


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


def totals_text(plan: Plan) -> str:
    """The sums over a plan."""
    totals = plan.totals
    trained = f"{totals.trainable:,} numbers trained, {totals.share:.3%} of the model's {totals.model:,}"
    frozen = f", {totals.frozen:,} frozen ones added" if totals.frozen else ""
    return f"total: {totals.sites} sites, {trained}{frozen}"


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
        key = (without_numbers(site.path), shape_text(site), site.method, site.rank,
               site.trainable, site.frozen, site.strategy, site.reason, site.update, site.facts)  # fmt: skip
        groups.setdefault(key, []).append(site)
    return list(groups.values())


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


def _equations(plan: Plan) -> list[str]:
    sizes: dict[str, list[str]] = {}
    for formula in plan.formulas.values():
        composed = formula.equation == f"delta = {formula.method}"  # a composition is its own name
        name = "" if composed else f"{formula.method}: "
        shapes = sizes.setdefault(name + formula.equation, [])
        shapes.append(f"{formula.outputs} x {formula.inputs}")
    found = []
    for equation, shapes in sizes.items():
        # Several steps: a line for each. The sizes are W's, and so stand behind what is said of W.
        steps = (equation.replace(": ", ":; ", 1) if "; " in equation else equation).split("; ")
        change = next(step for step in steps if re.search(rf"(^|: )({'|'.join(FORMS)}) = ", step))
        sized = (f"{step}  [{', '.join(dict.fromkeys(shapes))}]" if step is change else step for step in steps)
        found.append("\n  ".join(sized))
    return found


def _counted(pairs: Iterable[tuple[str, str]]) -> list[str]:
    counts = Counter(pairs)
    return [f"{what} ({count} site{'s' * (count > 1)}): {said}" for (what, said), count in counts.items()]


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
        groups.setdefault(without_numbers(name), []).append(name)
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
