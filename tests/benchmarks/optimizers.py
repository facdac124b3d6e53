"""What each optimizer costs of a training step: a Llama shape, rank 16 on all linears, the step as torch compiles it.

One LoRA step is built and compiled once, and takes each optimizer in turn: a row has the time of the whole step, and
that of `optimizer.step()` alone over gradients that stay, both medians, in milliseconds; the share is the second over
the step with AdamW. Optimizers for other methods (a frozen factor, three factors) are measured alone, over factors of
the same shapes. Table on standard output, everything as JSON with `--json`; under a minute on an H200.

    python -m tests.benchmarks.optimizers --json FILE
    python -m tests.benchmarks.optimizers --device cpu
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import surgery
from surgery.compiler import p9_emit
from surgery.optimizers.factors import Factors
from surgery.optimizers.geolora import GeoLora
from surgery.optimizers.lora_fa import LoraFA
from tests.benchmarks import arms
from tests.benchmarks.measuring import durations, machine, synchronize

SPELT = {
    "adamw": "adamw(lr = 1e-4)",
    "sgd": "sgd(lr = 1e-4)",
    "lora_plus": "lora_plus(adamw(lr = 1e-4), ratio = 16)",
    "riemannian": "riemannian(adamw(lr = 1e-4), damping = 1e-6)",
    "lora_rite": "lora_rite(lr = 1e-4)",
    "lora_rite, escape": "lora_rite(lr = 1e-4, escape = true)",
    "lora_pro of sgd": "lora_pro(sgd(lr = 1e-4))",
    "lora_pro of adamw": "lora_pro(adamw(lr = 1e-4))",
}
HEAD = f"{'':22s} {'step ms':>9s} {'alone ms':>9s} {'share':>7s} {'state GiB':>10s}"


@dataclass(frozen=True)
class Row:
    """One optimizer: medians in milliseconds, None where the whole step was not run; the state in GiB, on a GPU."""

    name: str
    step: float | None
    alone: float
    share: float
    state: float | None

    @property
    def line(self) -> str:
        """A row of the table."""
        step, state = ("" if value is None else f"{value:.2f}" for value in (self.step, self.state))
        return f"{self.name:22s} {step:>9s} {self.alone:9.2f} {self.share:7.1%} {state:>10s}"


def program(optimizer: str, shape: arms.Llama, compiled: bool) -> surgery.Program:
    """LoRA on all linears."""
    return surgery.parse(
        f"adapt {arms.ALL} {{ with lora(rank = {shape.rank}, alpha = {2 * shape.rank}) }}\n"
        f"step {{ optimizer = {optimizer}  batch = {shape.batch}  compile = {'on' if compiled else 'off'} }}"
    )


def making(step: Any, model: Any, optimizer: str, shape: arms.Llama) -> Callable[[Mapping[str, Tensor]], Any]:
    """`make_optimizer` of the step.py that a spec with this optimizer gives."""
    plan = surgery.plan(program(optimizer, shape, False), model)
    namespace: dict[str, Any] = {"__name__": "surgery_step"}
    exec(compile(p9_emit.run(plan, step.graph), "<step.py>", "exec"), namespace)
    made: Callable[[Mapping[str, Tensor]], Any] = namespace["make_optimizer"]
    return made


def median(function: Callable[[], Any], device: str, steps: int, warm: int = 2) -> float:
    """The median of several runs in milliseconds, behind some that do not count."""
    for _ in range(warm):
        function()
    synchronize(device)
    return statistics.median(durations(function, device, steps))


def alone(optimizer: Any, trained: list[Tensor], device: str, steps: int) -> float:
    """`optimizer.step()` over gradients that are there again before each, which takes no time on the device."""
    gradients = [1e-3 * torch.randn_like(tensor) for tensor in trained]

    def step() -> Tensor:
        for tensor, gradient in zip(trained, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
        return trained[0]

    found = median(step, device, steps)
    optimizer.zero_grad()
    return found


def other_methods(step: Any) -> dict[str, tuple[Any, list[Tensor]]]:
    """Optimizers of a frozen factor and of three factors, over tensors with the shapes of the step's."""
    draw = torch.Generator(step.device).manual_seed(0)
    halves, triples = [], []
    for product in step.plan.factors:
        left, right = (torch.empty_like(step.weights[key]) for key in product.tensors)
        for tensor in (left, right):
            tensor.normal_(generator=draw)
        core = 0.01 * torch.randn(left.shape[1], left.shape[1], generator=draw, device=step.device)
        halves.append(Factors(product.tensors, (left, right), product.scale, (False, False)))
        names = (product.tensors[0], f"{product.site}.core", product.tensors[1])
        bases = torch.linalg.qr(left)[0], torch.linalg.qr(right.T)[0].T.contiguous()
        triples.append(Factors(names, (bases[0], core, bases[1]), product.scale, (False, False, False)))
    trained = [one.tensors[0] for one in halves], [tensor for one in triples for tensor in one.tensors]
    bases_of = [
        torch.optim.AdamW([{"params": tensors, "lr": 1e-4, "weight_decay": 0.0}], foreach=False, fused=True)
        for tensors in trained
    ]
    return {
        "lora_fa": (LoraFA(bases_of[0], halves), trained[0]),
        "geolora": (GeoLora(bases_of[1], triples), trained[1]),
    }


def run(shape: arms.Llama, steps: int, compiled: bool) -> list[Row]:
    """All optimizers over one step."""
    model, tokens, device = shape.model(), shape.tokens(), shape.device
    some = {"input_ids": tokens[:, :64]}
    step: Any = surgery.compile(program(SPELT["riemannian"], shape, compiled), model, some, device)
    data = {"input_ids": tokens, "labels": tokens}
    trained = [tensor for tensor in step.weights.values() if tensor.requires_grad]
    rows: list[Row] = []

    def add(name: str, whole: float | None, part: float, state: float | None) -> None:
        base = next((row.step for row in rows if row.name == "adamw"), whole)
        assert base is not None
        rows.append(Row(name, whole, part, part / base, state))
        print(rows[-1].line, flush=True)

    for name, spelt in SPELT.items():
        before = torch.cuda.memory_allocated() if device != "cpu" else 0
        step.optimizer = making(step, model, spelt, shape)(step.weights)
        whole = median(lambda: step(data).loss, device, steps)
        state = (torch.cuda.memory_allocated() - before) / 2**30 if device != "cpu" else None
        add(name, whole, alone(step.optimizer, trained, device, steps), state)
        step.optimizer = None
    for name, (optimizer, tensors) in other_methods(step).items():
        add(name, None, alone(optimizer, tensors, device, steps), None)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10, help="steps that count, of each optimizer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    small = {"hidden": 64, "layers": 2, "batch": 2, "length": 16, "rank": 4, "vocabulary": 128}
    shape = arms.Llama(options.device) if options.device != "cpu" else arms.Llama("cpu", torch.float32, **small)
    print(HEAD)
    rows = run(shape, options.steps, compiled=options.device != "cpu")
    if options.json:
        sizes = {**asdict(shape), "dtype": str(shape.dtype)}
        about: dict[str, Any] = {**machine(options.device), "shape": sizes, "steps": options.steps}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
