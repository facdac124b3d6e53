"""How much memory a step takes on each of several processes, from what it takes on one.

The step's text is run for the rows of one process, as `memory.py` does. In graph scope that is the answer: a process
has the whole model. In module scope the frozen weights are spread by rows, and whole are, for a while, those of the
block that runs and of the one that is gathered meanwhile; the loss is that of whole logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor, nn

from surgery.compiler.built_again import built_again
from surgery.compiler.memory import of_plan
from surgery.compiler.plan import MemoryPlan, Plan, Site

Scope = Literal["graph", "module"]


def of_processes(plan: Plan, model: nn.Module, processes: int, scope: Scope) -> MemoryPlan:
    """The memory of a plan's step on one of its processes, the first, which has most rows. Errors as `of_plan`."""
    rows = -(-plan.step.batch // processes)
    changed: dict[str, object] = {"batch": rows}
    if plan.step.micro_batch is not None:
        changed["micro_batch"] = min(plan.step.micro_batch, rows)
    if scope == "module":
        changed["compile"] = "off"
    one = plan.model_copy(update={"step": plan.step.model_copy(update=changed)})
    if scope == "module" and processes > 1:
        one = _with_built_again(one)
    found = of_plan(one, model, whole_logits=scope == "module").model_copy(update={"processes": processes})
    return _spread(found, plan, model, processes) if scope == "module" and processes > 1 else found


def _with_built_again(plan: Plan) -> Plan:
    """With matrices of W's size built in the backward again; what no strategy does so is counted as if it were kept."""
    again = {site.path for site in built_again(plan)}

    def way(site: Site) -> Site:
        legal = any(found.strategy == "recompute" and found.legal for found in site.candidates)
        changes = legal and site.path in again
        return site.model_copy(update={"strategy": "recompute", "operation": ""}) if changes else site

    return plan.model_copy(update={"sites": tuple(map(way, plan.sites))})


def _spread(memory: MemoryPlan, plan: Plan, model: nn.Module, processes: int) -> MemoryPlan:
    """With the frozen weights spread by rows, and two pieces of the model whole that follow one another."""
    from surgery.runtime.sharded import pieces_of

    trained = {whole.name for whole in plan.trained}
    whole = {parameter for name, parameter in model.named_parameters() if name in trained}
    frozen = [parameter for parameter in model.parameters() if parameter not in whole]
    sizes = [_bytes(one for one in piece if one not in whole) for piece in pieces_of(model, whole)]
    gathered = max(map(sum, zip(sizes, [*sizes[1:], 0], strict=True)), default=0)
    spared = _bytes(frozen) - sum(
        _bytes([one]) // max(len(one), 1) * -(-len(one) // processes) if one.dim() else _bytes([one]) for one in frozen
    )
    return memory.model_copy(
        update={
            "weights": memory.weights - spared, "gathered": gathered, "peak": memory.peak - spared + gathered,
        }
    )  # fmt: skip


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
