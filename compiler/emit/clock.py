"""The step's clock in module scope: what `train_step` does around forward and backward, as two functions."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.compiler.emit.events import IMPORTS as IMPORTS_OF_EVENTS
from surgery.compiler.emit.events import event_source
from surgery.compiler.emit.imports import IMPORTS as IMPORTS_OF_GRAPHS
from surgery.compiler.event_program import EventProgram

IMPORTS = {"math.": "import math", "F.": "import torch.nn.functional as F"}  # by what is written where they are needed
IMPORTS |= {f"{name}(": line for name, line in (IMPORTS_OF_GRAPHS | IMPORTS_OF_EVENTS).items()}
HEADER = """\
from __future__ import annotations

import torch
from torch import Tensor
"""
TYPES = "Weights = dict[str, Tensor]  # tensors of the adapted model by their names in the plan\n"
# what an optimizer step does before its first forward, and after the optimizer
PARTS = (("begin_step", "Before the first forward of", ("start", "before forward")),
         ("end_step", "After the optimizer in", ("after step",)))  # fmt: skip


def clock_source(events: Sequence[EventProgram]) -> str:
    """Python that defines `begin_step`, `end_step` and, where there is one, `penalty`: of `weights`, `step`, `steps`.

    `end_step` takes the optimizer too.

    The events are those of step.py, function for function; what an optimizer step does between is somebody else's.
    """
    source = event_source(events)
    parts = list(source.definitions)
    for name, when, phases in PARTS:
        lines = [*(source.keeps if name == "begin_step" else []), *(line for p in phases for line in source.calls[p])]
        more = ", optimizer: torch.optim.Optimizer" if name == "end_step" else ""
        head = f"def {name}(weights: Weights, step: int, steps: int{more}) -> None:\n"
        head += f'    """{when} optimizer step `step`."""\n'
        parts.append(head + "".join(f"    {line}\n" for line in lines))
    body = "\n\n".join(parts)
    imports = [f"{line}\n" for written, line in IMPORTS.items() if written in body]
    return "".join([HEADER, *imports, "\n", TYPES, "\n\n", body])
