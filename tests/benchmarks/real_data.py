"""SURM, LoRS, MoRA and LoRA on real data at equal stored parameters: mean accuracy and spread over seeds.

    sst2    all-MiniLM-L6-v2 on SST-2, query and value adapted; --data holds train.tsv.gz and test.tsv.gz
    cifar   a small ViT, pretrained here on five classes of CIFAR-10 and adapted to the other five, query and value;
            --data holds train_0.bin.xz, train_1.bin.xz and test.bin.xz (label, length, JPEG)

Every method gets the same model, steps, batches and number of learning rates: the rate with the best accuracy on
held-out training rows is kept, and the table shows the test accuracy of its runs, one per seed. `stored` counts the
numbers per site that a saved adapter needs: circulant trains 2n and needs the n of its product. The pruned base has
half of the entries of every adapted weight at zero (the smallest); `zeros kept` says whether a method leaves them.

    python tests/benchmarks/real_data.py sst2 --data DIR --model DIR
    python tests/benchmarks/real_data.py cifar --data DIR
    python tests/benchmarks/real_data.py sst2 --data DIR --model DIR --steps 4 --rows 64 --seeds 1 --rates 1e-3
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib
import io
import json
import lzma
import multiprocessing
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import surgery

Rows = dict[str, Tensor]

# What is compared: (base, name of the row, method). `{n}` is the width; budgets are per site, query and value.
METHODS = [
    ("dense", "head only", ""),
    ("dense", "LoRA rank 1", "lora(rank = 1, alpha = 1)"),
    ("dense", "SURM circulant", "circulant()"),
    ("dense", "SURM symmetric Toeplitz", "symmetric_toeplitz()"),
    ("dense", "SURM Kronecker", "kronecker(rank = 16, alpha = 16)"),
    ("dense", "SURM LDR, 1 term", "ldr(terms = 1)"),
    ("dense", "MoRA rank 1", "mora(rank = 1)"),
    ("dense", "LoRA rank 8", "lora(rank = 8, alpha = 8)"),
    ("dense", "SURM LDR, 8 terms", "ldr(terms = 8)"),
    ("dense", "MoRA rank 8", "mora(rank = 8)"),
    ("pruned", "LoRA rank 8", "lora(rank = 8, alpha = 8)"),
    ("pruned", "LoRS rank 8", "lors(rank = 8)"),
    ("pruned", "SQFT rank 8", "sqft(rank = 8)"),
]

SPEC = """
{rule}
train classifier {{ lr = {head} }}
step {{
    optimizer = adamw(lr = {rate})   schedule = linear(warmup = 0.1)
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


def batches(rows: Rows, size: int, steps: int, seed: int) -> Iterator[Rows]:
    """Random batches, each row once per pass."""
    generator = torch.Generator().manual_seed(seed)
    count, order = len(rows["labels"]), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        taken, order = order[:size], order[size:]
        yield cut({name: value[taken.to(value.device)] for name, value in rows.items()})


def cut(batch: Rows) -> Rows:
    """A batch of texts without the columns that are padding in all of its rows."""
    if "attention_mask" not in batch:
        return batch
    length = int(batch["attention_mask"].sum(1).max())
    return {name: value if name == "labels" else value[:, :length] for name, value in batch.items()}


def run(setting: Setting, base: str, method: str, rate: float, seed: int, parts: tuple[str, ...]) -> dict[str, Any]:
    """Train once; the accuracy on each of `parts`, what was trained and stored, and whether zeros stayed."""
    model, train = setting.model(base), setting.rows("train")
    rule = f"adapt **.attention.**.{{{','.join(projections(model))}}} {{ with {method} }}" if method else ""
    text = SPEC.format(rule=rule, rate=rate, seed=seed, batch=setting.batch, steps=setting.steps, head=setting.head)
    example = {k: v for k, v in next(batches(train, 4, 1, 0)).items() if k != "labels"}
    calibration = list(batches(train, setting.batch, 4, 77)) if "lors" in method else None
    step = surgery.compile(surgery.parse(text), model, example_inputs=example, calibration=calibration)
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
    return {**found, "trained": trained, "stored": trained // 2 if "circulant" in method else trained,
            "kept": kept, "seconds": seconds, "loss": loss}  # fmt: skip


def accuracy(step: Any, rows: Rows, size: int) -> float:
    """The share of rows whose largest logit is the label."""
    right = 0
    for start in range(0, len(rows["labels"]), size):
        batch = cut({name: value[start : start + size] for name, value in rows.items()})
        logits = step.forward(**{name: value for name, value in batch.items() if name != "labels"}).logits
        right += int((logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows["labels"])


def measure(job: tuple[Setting, tuple[str, str, str], list[float], int]) -> dict[str, Any]:
    """One row of the table: choose the rate, then one run per seed."""
    setting, (base, name, method), rates, seeds = job
    torch.set_num_threads(1)
    chosen = [(run(setting, base, method, rate, 100, ("select",))["select"], rate) for rate in rates]
    rate = max(chosen)[1]
    runs = [run(setting, base, method, rate, seed, ("test",)) for seed in range(seeds)]
    return {"base": base, "name": name, "method": method, "rate": rate, "rates": chosen, "runs": runs}


# --- data -------------------------------------------------------------------------------------------------------------


def prepare_sst2(arguments: argparse.Namespace, folder: Path) -> None:
    """Tokenised rows, and the encoder's weights in float32."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    AutoModel.from_pretrained(arguments.model, dtype=torch.float32).save_pretrained(folder / "model")

    def read(name: str) -> tuple[list[str], list[int]]:
        with gzip.open(Path(arguments.data) / name, "rt", encoding="utf-8", newline="\n") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [row["sentence"] for row in rows], [int(row["label"]) for row in rows]

    def encode(texts: list[str], labels: list[int]) -> Rows:
        found = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {
            "input_ids": found["input_ids"],
            "attention_mask": found["attention_mask"],
            "labels": torch.tensor(labels),
        }

    texts, labels = read("train.tsv.gz")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    select, train = order[:1000], order[1000 : 1000 + arguments.rows]
    torch.save(encode([texts[i] for i in train], [labels[i] for i in train]), folder / "train.pt")
    torch.save(encode([texts[i] for i in select], [labels[i] for i in select]), folder / "select.pt")
    torch.save(encode(*read("test.tsv.gz")), folder / "test.pt")


def images(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels [n, 3, 32, 32] in 0..255 and labels [n] of a shard."""
    import numpy

    image: Any = importlib.import_module("PIL.Image")  # Pillow is needed by this measurement alone
    data, place, pixels, labels = lzma.decompress(path.read_bytes()), 0, [], []
    while place < len(data):
        label, size = struct.unpack_from("<BH", data, place)
        picture = image.open(io.BytesIO(data[place + 3 : place + 3 + size])).convert("RGB")
        pixels.append(torch.from_numpy(numpy.array(picture)))
        labels.append(label)
        place += 3 + size
    return torch.stack(pixels).permute(0, 3, 1, 2), torch.tensor(labels)


def prepare_cifar(arguments: argparse.Namespace, folder: Path) -> None:
    """Pretrain a ViT on classes 0 to 4; rows of classes 5 to 9 to adapt to."""
    from transformers import AutoConfig, AutoModelForImageClassification

    shards = [images(Path(arguments.data) / f"train_{k}.bin.xz") for k in (0, 1)]
    pixels, labels = (torch.cat(parts) for parts in zip(*shards, strict=True))
    tests, test_labels = images(Path(arguments.data) / "test.bin.xz")

    def ready(images: Tensor) -> Tensor:
        return (images.float() / 255 - 0.5) / 0.25

    device = arguments.device
    config = AutoConfig.for_model(
        "vit",
        hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, image_size=32, patch_size=4,
        num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForImageClassification.from_config(config).to(device)
    first = labels < 5
    given, wanted = ready(pixels[first]).to(device), labels[first].to(device)
    size = 250
    steps = max(1, arguments.epochs * (len(given) // size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for batch in batches({"pixel_values": given, "labels": wanted}, size, steps, 0):
        x = batch["pixel_values"]
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
        shift = torch.randint(-3, 4, (2,)).tolist()
        x = torch.roll(x, shift, (-2, -1))
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(pixel_values=x).logits, batch["labels"])
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        seen = test_labels < 5
        parts = torch.split(ready(tests[seen]).to(device), 500)
        guessed = torch.cat([model.eval()(pixel_values=part).logits.argmax(-1) for part in parts]).cpu()
    print(f"pretrained: {float((guessed == test_labels[seen]).float().mean()):.4f} on the first five classes")
    model.cpu().save_pretrained(folder / "model")
    new = torch.nonzero(labels >= 5).squeeze(1)
    new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(0))]
    parts_of = {"select": new[:1000], "train": new[1000 : 1000 + arguments.rows]}
    for name, rows in parts_of.items():
        torch.save({"pixel_values": ready(pixels[rows]), "labels": labels[rows] - 5}, folder / f"{name}.pt")
    unseen = test_labels >= 5
    torch.save({"pixel_values": ready(tests[unseen]), "labels": test_labels[unseen] - 5}, folder / "test.pt")


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
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3, 8e-3])
    parser.add_argument("--only", nargs="+", default=[], help="words that a row's method must hold one of")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", help="where to write the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_sst2(arguments, folder) if arguments.task == "sst2" else prepare_cifar(arguments, folder)
        setting = Setting(arguments.task, name, arguments.device, arguments.batch, arguments.steps, 2e-3)
        rows = [row for row in METHODS if not arguments.only or any(word in row[2] for word in arguments.only)]
        jobs = [(setting, row, arguments.rates if row[2] else arguments.rates[:1], arguments.seeds) for row in rows]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
            found = list(pool.map(measure, jobs))
    heads = ("stored", "lr", "mean", "least", "most", "zeros kept", "s")
    print(f"{'base':7} {'method':24} " + " ".join(f"{head:>7}" for head in heads))
    for row in found:
        tests = [run["test"] for run in row["runs"]]
        last = row["runs"][-1]
        kept = "-" if row["base"] == "dense" else "yes" if last["kept"] else "no"
        print(f"{row['base']:7} {row['name']:24} {last['stored']:>7,} {row['rate']:>7g} {statistics.mean(tests):>7.4f} "
              f"{min(tests):>7.4f} {max(tests):>7.4f} {kept:>10} {last['seconds']:>7.1f}")  # fmt: skip
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
