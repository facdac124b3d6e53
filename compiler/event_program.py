"""What an event is to the step that runs it: graphs over tensors of the sites, with their conditions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import fx

KEPT, START = ".before", ".start"  # behind the name of a tensor: what it was when the step, or the run, began
GRAD = ".grad"  # its gradient


@dataclass(frozen=True)
class Move:
    """W at all sites by narrow products: `W = start + scale * (product - product before)`, in one operation.

    The program's graph gives the factors: left, right, and those before if there are any. `source` is the placeholder
    of what W starts from, "W" itself for a change of it.
    """

    scale: float
    source: str
    transposed: bool  # W is stored as [in, out]
    times: str = ""  # a number of the clock that scales it too, as Python


@dataclass(frozen=True)
class Redraw:
    """Tensors begun anew: `start` with its numbers, of `axes` axes, in a step of a run of that seed."""

    start: str
    numbers: tuple[float, ...]
    axes: int
    seed: int


@dataclass(frozen=True)
class EventProgram:
    """What an event does at the sites of one size: a run of statements, or one of those that are special.

    `graph` has a placeholder per tensor it reads or writes and works in place; `sites` names, per site, the weight
    behind each placeholder: "first.A" behind "A", "first.A.before" behind "A_before", its value at the start of the
    step, "first.A.grad" behind "A_grad". What it writes otherwise is named by `writes`, and is among them too: W by a
    `move`; a state by `across`, a kernel that takes the graph's values at all sites of the programs with the same
    `joined`; the tensors that a step `redraws`, or whose optimizer state is forgotten.
    """

    comment: str
    phase: str  # "start" (before everything else in the step), "penalty" or a point of the step
    condition: str  # Python over the whole numbers `step` and `steps`
    function: str
    graph: fx.Graph = field(compare=False)
    sites: tuple[dict[str, str], ...] = ()
    move: Move | None = None
    across: str = ""
    number: str = ""  # the second argument of `across`, as Python over the clock
    joined: tuple[object, ...] = ()
    forgets: bool = False
    redraws: Redraw | None = None
    fills: str = ""  # a number of the clock, as Python, that the one tensor it writes is filled with
    writes: tuple[str, ...] = ()

    @property
    def kept(self) -> list[str]:
        """Names of what is copied at the start of a step whose condition holds."""
        names = [name for site in self.sites for name in site.values() if name.endswith(KEPT)]
        return [name.removesuffix(KEPT) for name in dict.fromkeys(names)]

    @property
    def reads_steps(self) -> bool:
        """Whether it needs the number of steps."""
        names = {str(node.target) for node in self.graph.nodes if node.op == "placeholder"}
        times = "" if self.move is None else self.move.times
        return "steps" in names or bool(re.search(r"\bsteps\b", f"{self.condition} {self.number} {self.fills} {times}"))
