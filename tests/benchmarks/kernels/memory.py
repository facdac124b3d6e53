"""Peak memory and time of a LoRA step by `recompute`, measured and predicted, on one GPU: Llama 2048 x 16, 4 x 2048.

    python -m tests.benchmarks.kernels.memory

About a minute. The prediction runs step.py on tensors without storage. Of the code before the low-rank operation it
gives 18.66 GiB eager and 15.76 compiled, where 18.8 and 15.80 had been measured on an H200. For what is there now it
gives, in GiB: eager none 14.9, budget(0.5) 9.1, blocks 3.8; compiled none 9.0, budget(0.5) 6.1, blocks 3.3. Expected
beside it: `usual`, with what torch itself would keep, 3 GiB more than compiled none and 2.5 % faster (per layer 400 MB
for the product before down_proj and 130 MB for two norms, at 4.25 TB/s); budget(0.5) 14 % and blocks 28 % slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import surgery
from surgery.compiler.memory import predicted
from tests.benchmarks.arms import ALL, RATE, Llama, frozen_graph
from tests.benchmarks.measuring import Row, Step, measure

SHAPE = Llama("cuda")
KEEPING = "backend=keeping_less, "  # how step.py tells torch's compiler to keep less


def lora(recompute: str, compiled: bool) -> Any:
    """The step of a program."""
    program = surgery.parse(f"""
        adapt {ALL} {{ with lora(rank = {SHAPE.rank}, alpha = {2 * SHAPE.rank})  expect {7 * SHAPE.layers} }}
        step {{
            optimizer = adamw(lr = {RATE})  batch = {SHAPE.batch}  steps = 1000  loss = causal_lm
            compile = {"on" if compiled else "off"}  recompute = {recompute}
        }}
    """)
    example = {"input_ids": SHAPE.tokens()[:, :64]}
    return surgery.compile(program, model=SHAPE.model(), example_inputs=example, device=SHAPE.device)


def arm(recompute: str, compiled: bool, usual: bool, expected: list[float]) -> Step:
    """Its step; the predicted peak in GiB goes to `expected`."""
    step, tokens = lora(recompute, compiled), SHAPE.tokens()
    if usual:
        assert KEEPING in step.source
        step.use_source(step.source.replace(KEEPING, ""))
    expected.append(predicted(step, SHAPE.length).peak / 2**30)

    def run() -> Tensor:
        loss: Tensor = step({"input_ids": tokens, "labels": tokens}).loss
        return loss

    return run


def show(row: Row, expected: float | None = None) -> None:
    """A line."""
    said = f"   predicted {expected:6.2f} GiB ({expected / row.peak - 1:+.1%})" if expected else ""
    print(f"{row.name:28s} {row.median:7.2f} ms {row.peak:6.2f} GiB   first {row.first:5.1f} s{said}", flush=True)


def main() -> None:
    """Every way, one after the other."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for compiled in (False, True):
        name = f"frozen {'compiled' if compiled else 'eager'}"
        show(measure(name, lambda compiled=compiled: frozen_graph(SHAPE, compiled), SHAPE.device, 8))  # type: ignore[misc]
    ways = [(word, compiled, False) for compiled in (False, True) for word in ("none", "budget(0.5)", "blocks")]
    for word, compiled, usual in [*ways, ("none", True, True)]:
        expected: list[float] = []
        name = f"{word} {'compiled' if compiled else 'eager'}{', usual' if usual else ''}"
        row = measure(name, lambda: arm(word, compiled, usual, expected), SHAPE.device, 8)  # noqa: B023
        show(row, None if usual else expected[0])


if __name__ == "__main__":
    main()
