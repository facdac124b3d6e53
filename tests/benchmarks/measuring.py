"""What a benchmark measures of one arm: step time, peak memory, seconds until the first step is done."""

from __future__ import annotations

import gc
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Tensor]  # runs one training step and gives its loss


@dataclass(frozen=True)
class Row:
    """One arm: times of a step in milliseconds, peak memory in GiB (NaN on a CPU), build and first step in seconds."""

    name: str
    median: float
    smallest: float
    peak: float
    build: float
    first: float
    loss: float


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Give back what the last arm held, compiled code included."""
    gc.collect()
    torch._dynamo.reset()
    if device != "cpu":
        torch.cuda.empty_cache()


def measure(name: str, build: Callable[[], Step], device: str, steps: int, warm: int = 4) -> Row:
    """Build an arm, time `steps` steps behind `warm` ones, and give its memory back."""
    free(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    before = time.perf_counter()
    step = build()
    synchronize(device)
    built = time.perf_counter()
    loss = step()
    synchronize(device)
    first = time.perf_counter()
    for _ in range(warm):
        loss = step()
    times = durations(step, device, steps)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else float("nan")
    row = Row(name, statistics.median(times), min(times), peak, built - before, first - built, float(loss))
    del step, loss
    free(device)
    return row


def durations(step: Step, device: str, steps: int) -> list[float]:
    """Milliseconds of each of several steps in a row; on a GPU from end to end, the host not waiting in between.

    A training loop reads no loss in every step, so the host runs ahead: what it takes shows where it is the slower one.
    """
    if device == "cpu":
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]  # type: ignore[no-untyped-call]
    for number, end in enumerate(ends):
        if number:
            step()
        end.record()
    synchronize(device)
    return [one.elapsed_time(other) for one, other in itertools.pairwise(ends)]


def alternate(arms: Mapping[str, Callable[[], Step]], device: str, steps: int, warm: int = 4) -> list[Row]:
    """Arms measured in turns, one step each: what the machine does meanwhile meets all of them alike. No memory."""
    built, rows = {}, []
    for name, build in arms.items():
        before = time.perf_counter()
        step = build()
        middle = time.perf_counter()
        step()
        synchronize(device)
        built[name] = (step, middle - before, time.perf_counter() - middle)
    times: dict[str, list[float]] = {name: [] for name in arms}
    losses: dict[str, Tensor] = {}
    for number in range(warm + steps):
        for name, (step, _, _) in built.items():
            start = time.perf_counter()
            losses[name] = step()
            synchronize(device)
            if number >= warm:
                times[name].append(1e3 * (time.perf_counter() - start))
    for name, (_, build_time, first) in built.items():
        median, smallest = statistics.median(times[name]), min(times[name])
        rows.append(Row(name, median, smallest, float("nan"), build_time, first, float(losses[name])))
    return rows


def machine(device: str) -> dict[str, str]:
    """What the figures were measured with."""
    cpu = f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
    found = {
        "device": cpu if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    for package in ("transformers", "peft", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Ratio:
    """A figure to aim at: what was reached, and the target."""

    what: str
    value: float
    target: float

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value <= self.target


HEAD = f"{'':58s} {'median ms':>10s} {'min ms':>9s} {'peak GiB':>9s} {'build s':>8s} {'first s':>8s} {'loss':>8s}"


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"{row.name:58s} {row.median:10.2f} {row.smallest:9.2f} {row.peak:9.2f} "
        f"{row.build:8.1f} {row.first:8.1f} {row.loss:8.4f}"
    )


def write(path: Path, about: Mapping[str, Any], rows: Sequence[Row], ratios: Sequence[Ratio]) -> None:
    """All figures as JSON."""
    found = {**about, "rows": [asdict(row) for row in rows], "ratios": [asdict(ratio) for ratio in ratios]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
