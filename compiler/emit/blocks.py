"""The text of step.py for each `step` block: its optimizer, schedule, gradients and step, those alike only once.

A spec of one block has `make_optimizer`, `schedule`, `gradients` and `train_step`. Of several, `BLOCKS` lists what each
of them runs; what is of a later block's own is called `train_step_in_block_2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.compiler import nodes, p1_parse
from surgery.compiler.plan import Plan
from surgery.compiler.span import Source

LEARN = '''def learn(weights: Weights, groups: list[dict[str, Any]]) -> None:
    """Let the tensors of these groups have gradients, and nothing else."""
    for tensor in weights.values():
        tensor.requires_grad_(False)
    for group in groups:
        for tensor in group["params"]:
            tensor.requires_grad_()
'''
OF_A_BLOCK = ("make_optimizer", "schedule", "train_step")


@dataclass
class Functions:
    """Functions by their texts: a block whose text is that of an earlier one runs the function of that block."""

    texts: list[str] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)  # by the plain name, that of each block
    _known: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, block: int, write: Callable[..., str]) -> str:
        """The name of a function in a block, counted from 0; `write` gives its text, all names ending in a `suffix`."""
        plain = write(suffix="")
        if plain not in self._known:
            suffix = f"_in_block_{block + 1}" if block else ""
            self.texts.append(write(suffix=suffix))
            self._known[plain] = f"{name}{suffix}"
        self.names.setdefault(name, []).append(self._known[plain])
        return self._known[plain]


def blocks_source(plan: Plan, *functions: Functions) -> str:
    """`BLOCKS`: the functions of each block, in the order in which they run."""
    items = p1_parse.run(Source(plan.file, plan.spec)).items
    lines = [item.span.line if item.span else 0 for item in items if isinstance(item, nodes.Step)]
    named = {name: own for one in functions for name, own in one.names.items()}
    rows = zip(*(named[name] for name in OF_A_BLOCK), strict=True)
    text = "BLOCKS = [  # one after the other: what makes the optimizer, the rate of a step, and the step\n"
    for row, line in zip(rows, lines, strict=True):
        text += f"    ({', '.join(row)}),  # {Path(plan.file).name}:{line}\n"
    return f"{text}]\n"


def of_block(namespace: Mapping[str, Any], block: int) -> tuple[Callable[..., Any], ...]:
    """What a step.py runs in a block, counted from 0: `make_optimizer`, `schedule` and `train_step`."""
    plain = tuple(namespace[name] for name in OF_A_BLOCK)
    found: tuple[Callable[..., Any], ...] = namespace["BLOCKS"][block] if "BLOCKS" in namespace else plain
    return found
