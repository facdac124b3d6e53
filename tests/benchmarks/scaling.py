"""How the step scales: time and memory of LoRA and of the frozen graph over layers, width, tokens and rank, as plots.

One axis moves at a time from a small Llama shape (4 layers, width 2048, 8192 tokens, rank 16; bfloat16, compiled): one
PNG per axis. Then, for linears of several sizes, every strategy that is legal is forced and timed, and the table says
where the one that the compiler takes by itself is not the fastest.

    python -m tests.benchmarks.scaling --out DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path

import surgery
from tests.benchmarks import arms
from tests.benchmarks.measuring import HEAD, Row, line, machine, measure

AXES: dict[str, list[int]] = {
    "layers": [4, 8, 16, 32],
    "width": [1024, 2048, 4096],
    "tokens": [1024, 4096, 8192, 32768],
    "rank": [4, 16, 64, 256],
}
START = {"layers": 4, "width": 2048, "tokens": 8192, "rank": 16}
STRATEGIES = ("branch", "fold", "recompute")


def shape_at(device: str, axis: str, value: int) -> arms.Llama:
    """The Llama shape with one axis moved."""
    at = {**START, axis: value}
    length = min(2048, at["tokens"])
    return arms.Llama(device, hidden=at["width"], layers=at["layers"], batch=at["tokens"] // length, length=length,
                      rank=at["rank"])  # fmt: skip


def along(device: str, axis: str, steps: int) -> dict[str, list[Row]]:
    """Frozen graph and LoRA at every value of an axis."""
    found: dict[str, list[Row]] = {"frozen": [], "LoRA": []}
    frozen: Row | None = None
    for value in AXES[axis]:
        shape = shape_at(device, axis, value)
        method = f"lora(rank = {shape.rank}, alpha = {2 * shape.rank})"
        if frozen is None or axis != "rank":  # the frozen graph has no rank
            frozen = measure(f"{axis} {value}: frozen", partial(arms.frozen_graph, shape, True), device, steps)
        found["frozen"].append(frozen)
        adapted = measure(f"{axis} {value}: LoRA", partial(arms.ours, shape, method, "compile = on"), device, steps)
        found["LoRA"].append(adapted)
        print(line(frozen), line(adapted), sep="\n", flush=True)
    return found


def plot(axis: str, found: dict[str, list[Row]], about: dict[str, str], path: Path) -> None:
    """Time and memory over one axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, rows), marker in zip(found.items(), "os", strict=True):
        times.plot(AXES[axis], [row.median for row in rows], marker=marker, label=name)
        memory.plot(AXES[axis], [row.peak for row in rows], marker=marker, label=name)
    for position, (frozen, adapted) in enumerate(zip(*found.values(), strict=True)):
        note, place = f"{adapted.median / frozen.median:.2f}x", (AXES[axis][position], adapted.median)
        times.annotate(note, place, textcoords="offset points", xytext=(0, 6), ha="center")
    for panel, label in ((times, "step, ms (median)"), (memory, "peak memory, GiB")):
        panel.set_xscale("log", base=2)
        panel.set_xticks(AXES[axis], [str(value) for value in AXES[axis]])
        panel.set_xlabel(axis)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    rest = ", ".join(f"{name} {value}" for name, value in START.items() if name != axis)
    figure.suptitle(f"LoRA on all linears of a Llama shape over {axis} ({rest}); {about['device']}, "
                    f"torch {about['torch']}, {about['date']}", fontsize=9)  # fmt: skip
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def choices(device: str, steps: int) -> list[dict[str, object]]:
    """Every strategy forced on a stack of linears, and the one that the compiler takes by itself."""
    found = []
    for width, rows, method in itertools.product(
        (1024, 2048, 4096), (1024, 8192), ("lora(rank = 16)", "lora(rank = 256)", "lors(rank = 16)")
    ):
        shape = arms.StackShape(device, width=width, layers=4, rows=rows)
        model, example = shape.model(), shape.input()
        plan = surgery.plan(
            surgery.parse(f"adapt layers.* {{ with {method} }} step {{ batch = {rows} loss = output }}"), model=model
        )
        chosen = plan.sites[0].strategy
        times = {}
        del model, example
        for strategy in STRATEGIES:
            forced = f"{method} strategy = {strategy}"
            build = partial(arms.adapted_stack, shape, forced, "compile = on")
            times[strategy] = measure(f"{method}, {width}, {rows} rows: {strategy}", build, device, steps).median
        best = min(times, key=lambda strategy: times[strategy])
        found.append({"method": method, "width": width, "rows": rows, "chosen": chosen, "fastest": best, **times})
        figures = "  ".join(f"{strategy} {times[strategy]:7.2f}" for strategy in STRATEGIES)
        said = "" if best == chosen else f"  <- {best} is {times[chosen] / times[best]:.2f}x faster"
        print(f"{method:18s} width {width:5d} rows {rows:6d}  {figures}  chosen {chosen}{said}", flush=True)
    return found


def main() -> None:
    """Measure the chosen axes and write plots and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--choices", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    about = machine(chosen.device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    figures: dict[str, object] = {"about": about, "start": START}
    print(HEAD)
    for axis in filter(None, chosen.axes.split(",")):
        found = along(chosen.device, axis, chosen.steps)
        figures[axis] = {name: [dataclasses.asdict(row) for row in rows] for name, rows in found.items()}
        plot(axis, found, about, chosen.out / f"{axis}.png")
    if chosen.choices:
        figures["choices"] = choices(chosen.device, chosen.steps)
    (chosen.out / "scaling.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
