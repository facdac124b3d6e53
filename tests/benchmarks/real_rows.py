"""The rows of SST-2 and of CIFAR-10, and the models that `real_data` adapts to them, prepared in a folder."""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib
import io
import lzma
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = dict[str, Tensor]


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
