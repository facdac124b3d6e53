"""Tokens per second of the LoRA step on one card and on all that a launcher gives, 4 x 2048 tokens on each.

    torchrun --nproc-per-node 2 -m tests.benchmarks.two_cards --out FILE.json

The step is compiled once. It is timed with all processes, each with the model and its own rows; then the first process
leaves the group and is timed alone, with the same compiled code.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

from torch import distributed

from surgery.runtime.distributed import joined, launched, local_device, number, wait
from tests.benchmarks import arms
from tests.benchmarks.measuring import durations, machine, synchronize


@dataclass(frozen=True)
class Cards:
    """Times of a step on some cards in milliseconds, and what all of them train in a second."""

    cards: int
    median: float
    smallest: float
    tokens_per_second: float


def main() -> None:
    """Measure, and let the first process tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="rows on each card")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args()
    began = time.perf_counter()
    with joined():
        device = local_device() if given.device == "cuda" else "cpu"
        shape = arms.Llama(device, hidden=given.hidden, layers=given.layers, batch=given.batch, length=given.length)
        step = arms.ours(shape, f"lora(rank = {shape.rank}, alpha = {2 * shape.rank})", "compile = auto")
        per_card = given.batch * given.length
        first = number() == 0

        def timed(cards: int) -> Cards:
            for _ in range(5):
                step()
            synchronize(device)
            times = durations(step, device, given.steps)
            median = statistics.median(times)
            return Cards(cards, median, min(times), 1e3 * cards * per_card / median)

        rows = []
        if launched() > 1:
            wait()
            rows.append(timed(launched()))
            wait()
            distributed.destroy_process_group()
        if not first:
            return
        rows.insert(0, timed(1))
    for row in rows:
        share = row.tokens_per_second / row.cards / rows[0].tokens_per_second
        print(f"{row.cards} x {given.batch} x {given.length}: {row.median:8.2f} ms a step, "
              f"{row.tokens_per_second:12,.0f} tokens/s, {share:.1%} of {row.cards} times one card")  # fmt: skip
    print(f"{time.perf_counter() - began:.0f} s in all")
    if given.out is not None:
        about = {**machine(given.device), **{name: getattr(given, name) for name in ("hidden", "layers")}}
        given.out.write_text(json.dumps({"machine": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
