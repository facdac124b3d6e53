"""Launch-bound and first steps on one GPU: MiniLM's shape at 32 x 64, and a Llama of width 1024 at 16 and 80 layers.

    python -m tests.benchmarks.kernels.replay

Under two minutes. Predicted on an H200 for MiniLM: peft eager 22 ms a step, ours eager 18, compiled 10, eager and
replayed 5, compiled and replayed 3.5 (a sixth of peft's). For the Llama: one graph per kind of block, the first step 5
to 6 s after the capture at 16 layers and at most 1.3 times as long at 80; a second length 6 to 10 s once, then none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import surgery
from surgery.runtime.replay import Replay
from tests.benchmarks.arms import RATE, Encoder, Llama, peft_encoder
from tests.benchmarks.measuring import free

DEVICE = "cuda"
WAYS = {"eager": "off", "compiled": "on", "replayed": "off", "compiled and replayed": "reduce_overhead"}


def ours(shape: Encoder, way: str) -> Any:
    """LoRA on query and value as a program, with the classifier trained."""
    program = surgery.parse(f"""
        adapt bert.encoder.layer.*.attention.self.{{query,value}} {{ with lora(rank = 8, alpha = 16) }}
        train classifier
        step {{ optimizer = adamw(lr = {RATE})  batch = 32  steps = 1000  loss = cross_entropy  compile = {WAYS[way]} }}
    """)
    example = {name: value for name, value in shape.inputs().items() if name != "labels"}
    step = surgery.compile(program, model=shape.model(), example_inputs=example, device=DEVICE)
    if way == "replayed":
        step._namespace["gradients"] = Replay(step._namespace["gradients"], step.device)
    return step


def timed(step: Callable[[], Tensor], steps: int = 40) -> tuple[float, float, float]:
    """Seconds of the first step, then milliseconds of one: median of those waited for, mean of those that are not."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in range(5):
        step()
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return first, statistics.median(times), 1e3 * (time.perf_counter() - start) / steps


def encoder() -> Iterator[str]:
    """A line per way, with the loss after the same number of steps; replaying must not change it."""
    shape = Encoder(DEVICE)
    batch = shape.inputs()
    base = 0.0
    for name in ("peft eager", *WAYS):
        free(DEVICE)
        run: Any = peft_encoder(shape) if name == "peft eager" else ours(shape, name)
        step: Callable[[], Tensor] = run if name == "peft eager" else lambda run=run: run(batch).loss  # type: ignore[misc]
        first, median, mean = timed(step)
        base = base or median
        replay = run._namespace["gradients"] if name != "peft eager" else None
        note = f", refused: {replay.refused or 'no'}" if isinstance(replay, Replay) else ""
        yield (f"{name:24s} first {first:5.1f} s  median {median:6.2f} ms  unwatched {mean:6.2f} ms  over peft "
               f"{median / base:.2f}  loss {float(step()):.9f}{note}")  # fmt: skip


def first_steps(layers: int) -> Iterator[str]:
    """Seconds of the compilation by surgery, of the first step, and of steps of other lengths, with the graphs made."""
    free(DEVICE)
    counters.clear()
    shape = Llama(DEVICE, hidden=1024, layers=layers, length=512)
    program = surgery.parse(f"""
        adapt model.layers.*.{{self_attn,mlp}}.*_proj {{ with lora(rank = 16, alpha = 32) }}
        step {{ optimizer = adamw(lr = {RATE})  batch = 4  steps = 1000  loss = causal_lm  compile = on }}
    """)
    model = shape.model()
    start = time.perf_counter()
    step = surgery.compile(program, model=model, example_inputs={"input_ids": shape.tokens()[:2, :64]}, device=DEVICE)
    yield f"Llama 1024 x {layers}: surgery.compile {time.perf_counter() - start:.1f} s"
    for rows, length in [(4, 512), (4, 512), (4, 384), (4, 448), (3, 130), (4, 512)]:
        tokens = shape.tokens()[:rows, :length]
        torch.cuda.synchronize()
        start = time.perf_counter()
        step({"input_ids": tokens, "labels": tokens})
        torch.cuda.synchronize()
        taken = time.perf_counter() - start
        yield f"    {rows} x {length}: {taken:6.2f} s, graphs {counters['stats']['unique_graphs']}"


def main() -> None:
    """Print everything."""
    print(torch.cuda.get_device_name(), torch.__version__)
    for line in encoder():
        print(line, flush=True)
    for layers in (16, 80):
        for line in first_steps(layers):
            print(line, flush=True)


if __name__ == "__main__":
    main()
