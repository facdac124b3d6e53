"""The speed of an adapted training step beside what bounds it and what people use, each figure with its target.

    llama     a Llama shape, 2048 x 16 layers, bfloat16, 4 x 2048 tokens, rank 16 on all linears
    first     seconds until the first step is done, 16 and 80 layers
    update    the update of W in literal Delta-LoRA, over a copy of W
    stack     eight sparse 4096 x 4096 layers: frozen, LoRA, LoRS
    encoder   MiniLM's shape, batch 32 x 64, over peft; on the CPU with two threads too

All in one process on one device: a table on standard output, everything as JSON with `--json`. `--device cpu` runs the
encoder at its size and everything else small, to see that it works.

    python -m tests.benchmarks.speed --json FILE
    python -m tests.benchmarks.speed --device cpu --parts encoder
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks import arms
from tests.benchmarks.measuring import HEAD, Ratio, Row, Step, alternate, line, machine, measure, write

PEFT = importlib.util.find_spec("peft") is not None


@dataclass
class Bench:
    """What was measured so far; an arm that cannot run says so and does not take the others with it."""

    device: str
    steps: int
    rows: dict[str, Row] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)

    def run(self, name: str, build: Callable[[], Step]) -> None:
        """Measure an arm and print its row."""
        try:
            self.add(measure(name, build, self.device, self.steps))
        except Exception as error:
            print(f"{name:58s} failed: {type(error).__name__}: {str(error).strip()[:300]}", flush=True)

    def add(self, row: Row) -> None:
        """Print a row and keep it."""
        self.rows[row.name] = row
        print(line(row), flush=True)

    def compare(self, what: str, target: float, name: str, other: str, of: str = "median") -> None:
        """A ratio of two rows (their difference for memory), if both were measured."""
        if name in self.rows and other in self.rows:
            mine, theirs = getattr(self.rows[name], of), getattr(self.rows[other], of)
            self.ratios.append(Ratio(what, mine - theirs if of == "peak" else mine / theirs, target))


def llama(bench: Bench, shape: arms.Llama, everything: bool) -> None:
    """The step of a decoder."""
    run, rank = bench.run, f"rank = {shape.rank}, alpha = {2 * shape.rank}"
    run("frozen Hugging Face model, eager", partial(arms.frozen_model, shape))
    run("frozen graph, eager", partial(arms.frozen_graph, shape, False))
    run("frozen graph, compiled", partial(arms.frozen_graph, shape, True))
    run("frozen graph, our passes, compiled", partial(arms.frozen_graph, shape, True, True))
    for mode in ("off", "on"):
        called = "compiled" if mode == "on" else "eager"
        run(f"surgery LoRA, {called}", partial(arms.ours, shape, f"lora({rank})", f"compile = {mode}"))
    compiled = {
        "surgery Delta-LoRA, telescoped": f"delta_lora({rank}, ratio = 2.0, start = 1)",
        "surgery DoRA": f"dora({rank})",
    }
    for name, method in compiled.items():
        run(f"{name}, compiled", partial(arms.ours, shape, method, "compile = on"))
    run(
        "surgery LoRA, recompute = blocks, compiled",
        partial(arms.ours, shape, f"lora({rank})", "compile = on  recompute = blocks"),
    )
    run(
        "surgery Delta-LoRA, literal, compiled",
        partial(arms.ours, shape, f"delta_lora({rank}, ratio = 2.0, start = 1)", "compile = on",
                rule="update = literal"),
    )  # fmt: skip
    run("surgery LoRA, replayed", partial(arms.ours, shape, f"lora({rank})", "compile = reduce_overhead"))
    run("surgery LoRA on q and o, compiled", partial(arms.ours, shape, f"lora({rank})", "compile = on", arms.SQUARE))
    run("surgery circulant on q and o, compiled", partial(arms.ours, shape, "circulant()", "compile = on", arms.SQUARE))
    if PEFT:
        run("peft LoRA, float32 adapters, eager", partial(arms.peft_lora, shape, False, True))
        run("peft LoRA, model's dtype, eager", partial(arms.peft_lora, shape, False, False))
        run("peft DoRA, model's dtype, eager", partial(arms.peft_lora, shape, False, False, use_dora=True))
        if everything:
            run("peft LoRA, float32 adapters, compiled", partial(arms.peft_lora, shape, True, True))
            run("peft LoRA, model's dtype, compiled", partial(arms.peft_lora, shape, True, False))
    run("frozen graph, compiled, once more", partial(arms.frozen_graph, shape, True))

    floor, eager, lora = "frozen graph, compiled", "frozen graph, eager", "surgery LoRA, compiled"
    bench.compare("LoRA step over the frozen graph, compiled", 1.08, lora, floor)
    bench.compare("LoRA step over the frozen graph, replayed", 1.08, "surgery LoRA, replayed", floor)
    bench.compare("LoRA step over the frozen graph, eager", 1.10, "surgery LoRA, eager", eager)
    bench.compare("LoRA peak memory over the frozen step, GiB", 1.2, lora, floor, "peak")
    blocks = "surgery LoRA, recompute = blocks, compiled"
    bench.compare("the same with recompute = blocks, GiB", 0.0, blocks, floor, "peak")
    bench.compare("telescoped Delta-LoRA over the LoRA step", 1.02, "surgery Delta-LoRA, telescoped, compiled", lora)
    bench.compare("DoRA over the LoRA step", 1.10, "surgery DoRA, compiled", lora)
    bench.compare(
        "circulant over the LoRA step, q and o", 1.10, "surgery circulant on q and o, compiled",
        "surgery LoRA on q and o, compiled",
    )  # fmt: skip
    for name in [name for name in bench.rows if name.startswith("peft LoRA")]:
        ours = lora if name.endswith("compiled") else "surgery LoRA, eager"
        bench.compare(f"surgery over {name}", 1.0, ours, name)


def first(bench: Bench, shape: arms.Llama) -> None:
    """Until the first step is done, over depth."""
    for layers in (shape.layers, 5 * shape.layers):
        deep = dataclasses.replace(shape, layers=layers)
        bench.run(f"surgery LoRA, {layers} layers", partial(arms.ours, deep, "lora(rank = 16)", "compile = on"))
    names = [f"surgery LoRA, {layers} layers" for layers in (shape.layers, 5 * shape.layers)]
    if all(name in bench.rows for name in names):
        shallow, deep_row = (bench.rows[name] for name in names)
        bench.ratios += [
            Ratio(f"first call after capture, {shape.layers} layers, s", shallow.first, 10),
            Ratio("first call, five times the layers", deep_row.first / shallow.first, 1.3),
            Ratio(f"capture and all passes, {5 * shape.layers} layers, s", deep_row.build, 20),
        ]


def update(bench: Bench, shape: arms.Llama) -> None:
    """W' = W + c (B A - B0 A0) over all sites, and what moving W costs at least."""
    from surgery.compiler.kernels.moved_weights import add_products

    generator = torch.Generator(shape.device).manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=shape.device, dtype=dtype) * 0.02

    width, narrow, wide = shape.hidden, shape.hidden // 4, 4 * shape.hidden
    sizes = [(width, width), (narrow, width), (narrow, width), (width, width), (wide, width), (wide, width),
             (width, wide)] * shape.layers  # fmt: skip
    weights = [draw(*size, dtype=shape.dtype) for size in sizes]
    copies = [torch.empty_like(weight) for weight in weights]
    lefts, old_lefts = ([draw(rows, shape.rank) for rows, _ in sizes] for _ in range(2))
    rights, old_rights = ([draw(shape.rank, columns) for _, columns in sizes] for _ in range(2))
    factors = [*zip(lefts, rights, old_lefts, old_rights, strict=True)]

    def copy() -> Tensor:
        for one, weight in zip(copies, weights, strict=True):
            one.copy_(weight)
        return weights[0][0, 0]

    def grouped() -> Tensor:
        add_products(copies, lefts, rights, 0.5, before=(old_lefts, old_rights), sources=weights)
        return copies[0][0, 0]

    def one_by_one() -> Tensor:
        for weight, (left, right, old_left, old_right) in zip(weights, factors, strict=True):
            both = torch.cat([left, -old_left], 1), torch.cat([right, old_right])
            weight.addmm_(both[0].to(weight.dtype), both[1].to(weight.dtype), alpha=0.5)
        return weights[0][0, 0]

    def naive() -> Tensor:
        for weight, (left, right, old_left, old_right) in zip(weights, factors, strict=True):
            weight.add_((left @ right - old_left @ old_right).to(weight.dtype), alpha=0.5)
        return weights[0][0, 0]

    for name, step in (("copy of all W", copy), ("update, grouped", grouped), ("update, addmm per site", one_by_one),
                       ("update, naive", naive)):  # fmt: skip
        bench.run(name, lambda step=step: step)  # type: ignore[misc]
    bench.compare("literal Delta-LoRA update over a copy of W", 1.15, "update, grouped", "copy of all W")


def stack(bench: Bench, shape: arms.StackShape) -> None:
    """Sparse layers: the masked method beside LoRA and the frozen layers."""
    bench.run("stack, frozen", partial(arms.frozen_stack, shape))
    ways = {"eager": "off", "compiled": "on", "replayed": "reduce_overhead"}
    for called, mode in ways.items():
        for name, method in (("LoRA", "lora(rank = 16)"), ("LoRS", "lors(rank = 16)")):
            bench.run(f"stack, {name}, {called}", partial(arms.adapted_stack, shape, method, f"compile = {mode}"))
    for called in ways:
        bench.compare(f"LoRA over frozen, eight layers, {called}", 1.10, f"stack, LoRA, {called}", "stack, frozen")
        bench.compare(f"LoRS over frozen, eight layers, {called}", 1.12, f"stack, LoRS, {called}", "stack, frozen")
        bench.compare(
            f"LoRS peak memory over LoRA's, {called}, GiB", 0.0, f"stack, LoRS, {called}", f"stack, LoRA, {called}",
            "peak",
        )  # fmt: skip


def encoder(bench: Bench, device: str) -> None:
    """A small encoder beside peft, in turns."""
    shape = arms.Encoder(device)
    where = "CPU" if device == "cpu" else "GPU"
    settings = {"eager": "compile = off", "compiled": "compile = on"}
    if device != "cpu":
        settings["replayed"] = "compile = reduce_overhead"
    built: dict[str, Callable[[], Step]] = {}
    if PEFT:
        built[f"encoder on {where}, peft eager"] = partial(arms.peft_encoder, shape)
    for called, setting in settings.items():
        built[f"encoder on {where}, surgery {called}"] = partial(arms.our_encoder, shape, setting)
    for row in alternate(built, device, max(20, bench.steps)):
        bench.add(row)
    best = "replayed" if device != "cpu" else "eager"
    bench.compare(f"encoder on {where}, surgery {best} over peft eager", 0.4 if device != "cpu" else 0.95,
                  f"encoder on {where}, surgery {best}", f"encoder on {where}, peft eager")  # fmt: skip


def parts(bench: Bench, chosen: argparse.Namespace) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every part by its name."""
    small = chosen.device == "cpu"
    shape = arms.Llama(chosen.device)
    if small:
        shape = arms.Llama(chosen.device, torch.float32, 64, 2, 2, 64, 4, 320)
    sparse = arms.StackShape(chosen.device)
    yield "llama", lambda: llama(bench, shape, chosen.all)
    yield "first", lambda: first(bench, shape if small else dataclasses.replace(shape, hidden=1024))
    yield "update", lambda: update(bench, shape)
    yield "stack", lambda: stack(bench, arms.StackShape("cpu", torch.float32, 64, 8, 128) if small else sparse)
    yield "encoder", lambda: encoder(bench, chosen.device)


def main() -> None:
    """Measure the chosen parts, print the table and the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", default="llama,first,update,stack,encoder")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--all", action="store_true", help="peft compiled too, a minute more for each")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    bench = Bench(chosen.device, chosen.steps)
    about = machine(chosen.device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(HEAD)
    for name, run in parts(bench, chosen):
        if name in chosen.parts.split(","):
            run()
        if chosen.json:  # what is measured stays, should a later part be cut off
            write(chosen.json, about, list(bench.rows.values()), bench.ratios)
    if chosen.device != "cpu" and "encoder" in chosen.parts.split(","):
        torch.set_num_threads(2)
        encoder(bench, "cpu")
    print(f"\n{'':58s} {'reached':>10s} {'target':>9s}")
    for ratio in bench.ratios:
        said = "" if ratio.met or math.isnan(ratio.value) else "  missed"
        print(f"{ratio.what:58s} {ratio.value:10.3f} {ratio.target:9.2f}{said}")
    if chosen.json:
        write(chosen.json, about, list(bench.rows.values()), bench.ratios)


if __name__ == "__main__":
    main()
