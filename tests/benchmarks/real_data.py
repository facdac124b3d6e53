"""Methods, and optimizers of one method, on real data: mean accuracy and spread over seeds.

    sst2    all-MiniLM-L6-v2 on SST-2, query and value adapted; --data holds train.tsv.gz and test.tsv.gz
    cifar   a small ViT, pretrained here on five classes of CIFAR-10 and adapted to the other five, query and value;
            --data holds train_0.bin.xz, train_1.bin.xz and test.bin.xz (label, length, JPEG)

`--table methods`: SURM, LoRS, MoRA and LoRA at equal stored numbers. `stored` counts the numbers per site that a saved
adapter needs: circulant trains 2n and needs the n of its product. The pruned base has half of the entries of every
adapted weight at zero (the smallest); `zeros kept` says whether a method leaves them.

`--table procedures`: LoRA by AdamW and by the optimizers that know the pair, and Delta-LoRA beside the LoRA whose
change of W is as large, of the scale (1 + ratio) alpha.

Every row gets the same model, steps, batches and number of learning rates: the rate with the best accuracy on
held-out training rows is kept, and the table shows the test accuracy of its runs, one per seed. The time of a step is
taken in turns with those of all other rows, nothing else running.

    python -m tests.benchmarks.real_data sst2 --data DIR --model DIR
    python -m tests.benchmarks.real_data sst2 --data DIR --model DIR --table procedures
    python -m tests.benchmarks.real_data cifar --data DIR
    python -m tests.benchmarks.real_data sst2 --data DIR --model DIR --steps 4 --rows 64 --seeds 1 --rates 1e-3
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import surgery
from tests.benchmarks.measuring import Step, alternate, machine
from tests.benchmarks.real_rows import Rows, batches, cut, prepare_cifar, prepare_sst2


@dataclass(frozen=True)
class Arm:
    """One row of a table: a base, what it is called, the method, and the optimizer at a rate."""

    base: str
    name: str
    method: str
    optimizer: str = "adamw(lr = {rate})"


# What is compared; budgets are per site, query and value.
METHODS = [
    Arm("dense", "head only", ""),
    Arm("dense", "LoRA rank 1", "lora(rank = 1, alpha = 1)"),
    Arm("dense", "SURM circulant", "circulant()"),
    Arm("dense", "SURM symmetric Toeplitz", "symmetric_toeplitz()"),
    Arm("dense", "SURM Kronecker", "kronecker(rank = 16, alpha = 16)"),
    Arm("dense", "SURM LDR, 1 term", "ldr(terms = 1)"),
    Arm("dense", "MoRA rank 1", "mora(rank = 1)"),
    Arm("dense", "LoRA rank 8", "lora(rank = 8, alpha = 8)"),
    Arm("dense", "SURM LDR, 8 terms", "ldr(terms = 8)"),
    Arm("dense", "MoRA rank 8", "mora(rank = 8)"),
    Arm("pruned", "LoRA rank 8", "lora(rank = 8, alpha = 8)"),
    Arm("pruned", "LoRS rank 8", "lors(rank = 8)"),
    Arm("pruned", "SQFT rank 8", "sqft(rank = 8)"),
]
LORA = "lora(rank = 8, alpha = 8)"
PROCEDURES = [
    Arm("dense", "AdamW", LORA),
    Arm("dense", "LoRA+, ratio 16", LORA, "lora_plus(adamw(lr = {rate}), ratio = 16)"),
    Arm("dense", "Riemannian", LORA, "riemannian(adamw(lr = {rate}), damping = 1e-6)"),
    Arm("dense", "LoRA-Pro", LORA, "lora_pro(adamw(lr = {rate}))"),
    Arm("dense", "LoRA-RITE", LORA, "lora_rite(lr = {rate})"),
    Arm("dense", "Delta-LoRA, ratio 2", "delta_lora(rank = 8, alpha = 8, ratio = 2, start = 20)"),
    Arm("dense", "LoRA, alpha 24", "lora(rank = 8, alpha = 24)"),
]
TABLES = {"methods": (METHODS, [5e-4, 2e-3, 8e-3]), "procedures": (PROCEDURES, [1e-4, 5e-4, 2e-3, 8e-3])}

SPEC = """
{rule}
train classifier {{ lr = {head} }}
step {{
    optimizer = {optimizer}   schedule = linear(warmup = 0.1)
    batch = {batch}   steps = {steps}   clip = 1.0   seed = {seed}   loss = cross_entropy   compile = off
}}
"""


@dataclass(frozen=True)
class Setting:
    """One data set with its model: how it is loaded, and which weights are adapted."""

    task: str
    folder: str  # of the prepared tensors and the model's weights
    device: str
    batch: int
    steps: int
    head: float

    def model(self, base: str) -> Any:
        """The model with its pretrained weights and a fresh head; `pruned` lacks half of each adapted weight."""
        from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

        kind: Any = AutoModelForSequenceClassification if self.task == "sst2" else AutoModelForImageClassification
        torch.manual_seed(0)
        labels = 2 if self.task == "sst2" else 5
        model = kind.from_pretrained(Path(self.folder) / "model", num_labels=labels, ignore_mismatched_sizes=True)
        with torch.no_grad():
            torch.nn.init.normal_(model.classifier.weight, std=0.02)
            torch.nn.init.zeros_(model.classifier.bias)
            for name, weight in model.named_parameters() if base == "pruned" else ():
                if name.endswith(tuple(f"{part}.weight" for part in projections(model))):
                    weight[weight.abs() <= weight.abs().flatten().median()] = 0
        return model.to(self.device)

    def rows(self, part: str) -> Rows:
        """The prepared rows: train, select or test."""
        loaded: Rows = torch.load(Path(self.folder) / f"{part}.pt", weights_only=True)
        return {name: value.to(self.device) for name, value in loaded.items()}


def projections(model: Any) -> tuple[str, str]:
    """What the model calls its query and its value."""
    modern = any(name.endswith(".q_proj") for name, _ in model.named_modules())
    return ("q_proj", "v_proj") if modern else ("query", "value")


def built(setting: Setting, arm: Arm, rate: float, seed: int) -> tuple[Any, Any, Rows]:
    """A training step, the model that it was made of, and its rows."""
    model, train = setting.model(arm.base), setting.rows("train")
    rule = f"adapt **.attention.**.{{{','.join(projections(model))}}} {{ with {arm.method} }}" if arm.method else ""
    text = SPEC.format(rule=rule, optimizer=arm.optimizer.format(rate=rate), seed=seed, batch=setting.batch,
                       steps=setting.steps, head=setting.head)  # fmt: skip
    example = {k: v for k, v in next(batches(train, 4, 1, 0)).items() if k != "labels"}
    calibration = list(batches(train, setting.batch, 4, 77)) if "lors" in arm.method else None
    return surgery.compile(surgery.parse(text), model, example_inputs=example, calibration=calibration), model, train


def run(setting: Setting, arm: Arm, rate: float, seed: int, parts: tuple[str, ...]) -> dict[str, Any]:
    """Train once; the accuracy on each of `parts`, what was trained and stored, and whether zeros stayed."""
    step, model, train = built(setting, arm, rate, seed)
    started = time.perf_counter()
    for batch in batches(train, setting.batch, setting.steps, seed):
        result = step(batch)
    loss = float(result.loss)
    seconds = time.perf_counter() - started
    kept = all(
        bool((step.effective_weight(site.path)[model.get_parameter(site.parameter) == 0] == 0).all())
        for site in step.plan.sites
    )
    site = step.plan.sites[0] if step.plan.sites else None
    found = {part: accuracy(step, setting.rows(part), setting.batch * 8) for part in parts}
    trained = site.trainable if site else 0
    return {**found, "trained": trained, "stored": trained // 2 if "circulant" in arm.method else trained,
            "kept": kept, "seconds": seconds, "loss": loss}  # fmt: skip


def accuracy(step: Any, rows: Rows, size: int) -> float:
    """The share of rows whose largest logit is the label."""
    right = 0
    for start in range(0, len(rows["labels"]), size):
        batch = cut({name: value[start : start + size] for name, value in rows.items()})
        logits = step.forward(**{name: value for name, value in batch.items() if name != "labels"}).logits
        right += int((logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows["labels"])


def measure(job: tuple[Setting, Arm, list[float], int]) -> dict[str, Any]:
    """One row of the table: choose the rate, then one run per seed."""
    setting, arm, rates, seeds = job
    torch.set_num_threads(1)
    chosen = [(run(setting, arm, rate, 100, ("select",))["select"], rate) for rate in rates]
    rate = max(chosen)[1]
    runs = [run(setting, arm, rate, seed, ("test",)) for seed in range(seeds)]
    scores = ", ".join(f"{one['test']:.4f}" for one in runs)
    print(f"{arm.name} on {arm.base}: {scores} at {rate:g}", flush=True)
    return {**asdict(arm), "rate": rate, "rates": chosen, "runs": runs}


def stepping(setting: Setting, arm: Arm, rate: float) -> Step:
    """Training steps one after the other, for their time."""
    step, _, train = built(setting, arm, rate, 0)
    rows = itertools.cycle(list(batches(train, setting.batch, 10, 0)))
    return lambda: step(next(rows)).loss


def main() -> None:
    """Prepare, run every row, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("sst2", "cifar"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", help="folder of all-MiniLM-L6-v2, for sst2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=4000, help="training rows")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=40, help="of the ViT's pretraining")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", choices=TABLES, default="methods")
    parser.add_argument("--rates", type=float, nargs="+", help="of each row, in place of the table's")
    parser.add_argument("--only", nargs="+", default=[], help="words that a row's method must hold one of")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", help="where to write the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_sst2(arguments, folder) if arguments.task == "sst2" else prepare_cifar(arguments, folder)
        setting = Setting(arguments.task, name, arguments.device, arguments.batch, arguments.steps, 2e-3)
        arms, rates = TABLES[arguments.table]
        rates = arguments.rates or rates
        arms = [arm for arm in arms if not arguments.only or any(word in arm.method for word in arguments.only)]
        jobs = [(setting, arm, rates if arm.method else rates[:1], arguments.seeds) for arm in arms]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
            found = list(pool.map(measure, jobs))
        torch.set_num_threads(1)
        steps = {str(number): functools.partial(stepping, setting, arm, row["rate"])
                 for number, (arm, row) in enumerate(zip(arms, found, strict=True))}  # fmt: skip
        for row, timed in zip(found, alternate(steps, arguments.device, steps=20), strict=True):
            row["milliseconds"] = timed.median
    heads = ("stored", "lr", "mean", "spread", "least", "most", "zeros kept", "ms")
    print(f"{'base':7} {'method':24} " + " ".join(f"{head:>7}" for head in heads))
    for row in found:
        tests = [run["test"] for run in row["runs"]]
        spread = statistics.stdev(tests) if len(tests) > 1 else 0.0
        last = row["runs"][-1]
        kept = "-" if row["base"] == "dense" else "yes" if last["kept"] else "no"
        scores = " ".join(f"{score:>7.4f}" for score in (statistics.mean(tests), spread, min(tests), max(tests)))
        print(f"{row['base']:7} {row['name']:24} {last['stored']:>7,} {row['rate']:>7g} {scores} {kept:>10} "
              f"{row['milliseconds']:>7.1f}")  # fmt: skip
    if arguments.json:
        about = {**machine(arguments.device), **{key: str(value) for key, value in vars(arguments).items()}}
        Path(arguments.json).write_text(json.dumps({**about, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
