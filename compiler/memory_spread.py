"""How much memory a step takes on each of several processes, from what it takes on one.

The step's text is run for the rows of one process, as `memory.py` does. In graph scope that is the answer: a process
has the whole model. In module scope the model is changed in place, its frozen weights are spread by rows, and whole
are, for a while, those that are being gathered; the loss is that of whole logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from surgery.compiler.algebra.instance import instance
from surgery.compiler.built_again import built_again
from surgery.compiler.memory import of_plan
from surgery.compiler.plan import MemoryPlan, Plan, Site, StepPlan

Scope = Literal["graph", "module"]


def of_processes(plan: Plan, model: nn.Module, processes: int, scope: Scope) -> MemoryPlan:
    """The memory of a plan's step on one of its processes, the first, which has most rows. Errors as `of_plan`."""
    first, *others = (_of_one(step, processes, scope) for step in plan.step_blocks)
    later = (block.model_copy(update={"step": own}) for block, own in zip(plan.later, others, strict=True))
    one = plan.model_copy(update={"step": first, "later": tuple(later)})
    if scope == "module" and processes > 1:
        one = _with_built_again(one)
    found = of_plan(one, model, whole_logits=scope == "module").model_copy(update={"processes": processes})
    if scope == "graph":
        return found
    copied = _bytes(_changed(plan, model))
    found = found.model_copy(update={"weights": found.weights - copied, "peak": found.peak - copied})
    return _spread(found, one, model, processes) if processes > 1 else found


def _changed(plan: Plan, model: nn.Module) -> set[nn.Parameter]:
    """What a step in graph scope has copies of, since it writes to them: in module scope there is one of each."""
    formulas = {key: instance(plan, key) for key in plan.formulas}
    written = {key for key, formula in formulas.items() if formula.moves_base or formula.corrections}
    names = {site.parameter for site in plan.sites if site.formula in written and not site.untied}
    names |= {whole.name for whole in plan.trained}
    return {parameter for name, parameter in model.named_parameters(remove_duplicate=False) if name in names}


def _of_one(step: StepPlan, processes: int, scope: Scope) -> StepPlan:
    """A `step` block as one of the processes runs it."""
    rows = -(-step.batch // processes)
    changed: dict[str, object] = {"batch": rows}
    if step.micro_batch is not None:
        changed["micro_batch"] = min(step.micro_batch, rows)
    if scope == "module":
        changed["compile"] = "off"
    return step.model_copy(update=changed)


def _with_built_again(plan: Plan) -> Plan:
    """With matrices of W's size built in the backward again; what no strategy does so is counted as if it were kept."""
    again = {site.path for site in built_again(plan)}

    def way(site: Site) -> Site:
        legal = any(found.strategy == "recompute" and found.legal for found in site.candidates)
        changes = legal and site.path in again
        return site.model_copy(update={"strategy": "recompute", "operation": ""}) if changes else site

    return plan.model_copy(update={"sites": tuple(map(way, plan.sites))})


def _spread(memory: MemoryPlan, plan: Plan, model: nn.Module, processes: int) -> MemoryPlan:
    """With the frozen weights spread by rows, and at the peak what of them is whole.

    A piece of the model is gathered into one buffer and copied from there into its weights. In the forward that buffer
    stays until the next piece has been copied, in the backward it goes at once, and the piece before is being gathered.
    """
    from surgery.runtime.sharded import pieces_of

    trained = {whole.name for whole in plan.trained}
    whole = {parameter for name, parameter in model.named_parameters() if name in trained}
    frozen = [parameter for parameter in model.parameters() if parameter not in whole]
    spared = _bytes(frozen) - sum(
        _bytes([one]) // max(len(one), 1) * -(-len(one) // processes) if one.dim() else _bytes([one]) for one in frozen
    )
    always, *sizes = [_bytes(one for one in piece if one not in whole) for piece in pieces_of(model, whole)]
    forward = always + max((before + 2 * size for before, size in pairwise([always, *sizes])), default=always)
    backward = always + max((size + max(size, before) for before, size in pairwise([0, *sizes])), default=always)
    # those of several micro-batches are there, if not in every block
    accumulates = any(step.micro_batch is not None and step.micro_batch < step.batch for step in plan.step_blocks)
    gradients = memory.trained if accumulates else 0
    early = memory.weights - spared + forward + memory.trained + gradients + memory.optimizer + memory.kept
    late = memory.peak - spared + backward
    changes = {"weights": memory.weights - spared, "gathered": backward, "peak": late}
    if early > late:  # in the forward of the last block
        changes |= {"gathered": forward, "peak": early, "gradients": gradients, "outputs": 0, "backward": 0}
    return memory.model_copy(update=changes)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
