"""The text of step.py around the forward: loss, optimizer, schedule and the step's clock."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.compiler.emit.events import EventSource
from surgery.compiler.emit.loss import LossText
from surgery.compiler.emit.tables import names_list
from surgery.compiler.plan import SchedulePlan, StepPlan

HEADER = """\
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]  # every tensor of the adapted model by its full name
"""

COMPILED = '''def keeping_less(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Torch's compiler, whose backward computes norms, activations and the like again: only products are kept."""
    from torch._inductor.compile_fx import compile_fx

    with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
        return compile_fx(graph, inputs)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled for the shapes that it is first called with, and once for all others; evaluation apart."""
    fixed = torch.compile(function, backend=keeping_less, dynamic=False)
    varying = torch.compile(function, backend=keeping_less, dynamic=True)
    first: dict[bool, list[torch.Size]] = {}

    def run(*given: Any, **options: Any) -> Any:
        shapes = [value.shape for value in given if isinstance(value, Tensor)]
        return (fixed if first.setdefault(torch.is_grad_enabled(), shapes) == shapes else varying)(*given, **options)

    return run
'''

COMPILE_WHOLE = '''def compile_forward() -> None:
    """Let torch compile the forward."""
    for name in COMPILED:
        globals()[name] = compiled(globals()[name])
'''

COMPILE_BLOCKS = '''def like_the_others(block: Callable[..., Any]) -> Callable[..., Any]:
    """A block that trains, with a gradient to what enters it: the first needs none, but can share what is compiled."""

    def run(w: Weights, *given: Any) -> Any:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in w.values()):
            place = next(place for place, value in enumerate(given) if isinstance(value, Tensor))
            if given[place].is_floating_point() and not given[place].requires_grad:
                given = (*given[:place], given[place].detach().requires_grad_(), *given[place + 1 :])
        return block(w, *given)

    return run


def compile_forward() -> None:
    """Let torch compile the forward, block by block: 80 blocks then take no longer than 4."""
    for name in COMPILED:
        globals()[name] = like_the_others(compiled(globals()[name]))
'''

MAIN = """\
if __name__ == "__main__":
    from surgery.runtime.alone import main

    raise SystemExit(main(__file__))
"""

_PROCESSES = "from surgery.compiler.kernels.over_processes import"
IMPORTS = {
    "over_processes": f"{_PROCESSES} over_processes, step_over_processes",
    "rounds_of_others": f"{_PROCESSES} rounds_of_others",
}


def schedule_source(schedule: SchedulePlan, suffix: str = "") -> str:
    """`schedule(step, steps)`: the factor on the learning rate, by transformers' formulas."""
    words = {"constant": "constant", "linear": "linear decay", "cosine": "half a cosine"}[schedule.name]
    warm = schedule.warmup > 0
    title = f"after a linear warmup, {words}" if warm else words
    lines = [
        f"def schedule{suffix}(step: int, steps: int) -> float:",
        f'    """Factor on the learning rate at a step: {title}."""',
    ]
    if warm:
        count = f"math.ceil({schedule.warmup} * steps)" if schedule.warmup < 1 else str(math_int(schedule.warmup))
        lines += [f"    warmup = {count}", "    if step < warmup:", "        return step / max(1, warmup)"]
    since, length = ("(step - warmup)", "(steps - warmup)") if warm else ("step", "steps")
    if schedule.name == "constant":
        return "\n".join([*lines, "    return 1.0"]) + "\n"
    if schedule.name == "linear":
        decay = f"max(0.0, (steps - step) / max(1, {length.strip('()')}))"
    else:
        lines.append(f"    progress = {since} / max(1, {length.strip('()')})")
        decay = "max(0.0, 0.5 * (1.0 + math.cos(math.pi * 2.0 * 0.5 * progress)))"
    if schedule.minimum:
        lines.append(f"    decay = {decay}")
        decay = f"decay * (1 - {schedule.minimum}) + {schedule.minimum}"
    return "\n".join([*lines, f"    return {decay}"]) + "\n"


def math_int(value: float) -> int:
    """A number of steps."""
    return round(value)


CUT_PADDING = """def without_padding(part: dict[str, Tensor]) -> dict[str, Tensor]:
    \"\"\"A micro-batch up to its last real token; on a GPU, where one would wait for that number, as it is.\"\"\"
    mask = part["attention_mask"]
    if mask.is_cuda:
        return part
    length = int((mask.ne(0).any(0) * torch.arange(1, mask.shape[1] + 1)).max())
    return {name: tensor[:, :length] if tensor.shape[:2] == mask.shape else tensor for name, tensor in part.items()}
"""


PUT_BACK = """def put_back(weights: Weights, values: Weights) -> None:
    \"\"\"Tensors as they were, in place.\"\"\"
    for name, value in values.items():
        weights[name].copy_(value)


""".splitlines()


def gradients_source(
    plan: StepPlan, inputs: Sequence[str], loss: LossText, cuts_padding: bool = False, moves_twice: bool = False,
    together: bool = False, observed: str = "", suffix: str = "",
) -> str:  # fmt: skip
    """`gradients`: forward and backward of a step's batch, and nothing that the host must wait for or decide.

    `cuts_padding`: micro-batches end at their own last real token. `moves_twice`: the backward runs blocks again that
    have running statistics. `together`: all processes take as many micro-batches, since they hold one model together.
    `observed` are outputs and targets for an optimizer that reads how the ones depend on what is trained.
    """
    scaled = plan.precision == "float16"
    arguments = ", ".join(f'part["{name}"]' for name in inputs)
    size = str(plan.micro_batch) if plan.micro_batch else "rows"
    rounds = f"math.ceil(rows / {size})" if plan.micro_batch else "min(rows, 1)"
    by = size if plan.micro_batch else "max(rows, 1)"  # of several processes one may have no rows
    more = ", scaler: torch.amp.GradScaler" if scaled else ", optimizer: Any" if observed else ""
    adds = "shows its outputs" if observed else "adds its gradients"
    lines = [
        f"def gradients{suffix}(weights: Weights, batch: dict[str, Tensor]{more}) -> Tensor:",
        f'    """The loss of a step, summed over its labels and divided by the number of all; {adds}."""',
        f'    labels = batch["{loss.labels}"]',
        f"    count = over_processes({loss.count}(labels))",
        "    rows = labels.shape[0]",
        *([f"    idle = rounds_of_others({rounds})  # asked first: each forward waits for all"] if together else []),
        "    loss = torch.zeros((), device=labels.device)",
        f"    for start in range(0, rows, {by}):",
        f"        part = {{name: tensor[start : start + {size}] for name, tensor in batch.items()}}",
        *(["        part = without_padding(part)"] if cuts_padding else []),
    ]
    share = f'share = {loss.total}(output, part["{loss.labels}"]) / count'
    run = [f"output = forward(weights, {arguments}, training=True){loss.reads}"]
    if loss.chunked:
        share = f'share = {loss.total}(weights, hidden, part["{loss.labels}"], count)'
        run = [f"hidden = hidden_states(weights, {arguments}, training=True)", share]
    if plan.precision != "model":
        run = [f"with torch.autocast(labels.device.type, torch.{plan.precision}):", *(f"    {line}" for line in run)]
    backward = "scaler.scale(share).backward()" if scaled else "share.backward()"
    if observed:
        backward = f"optimizer.observe(*{observed})  # a backward pass for each output"
    lines += [
        *(f"        {line}" for line in run),
        *([] if loss.chunked else [f"        {share}"]),
        *(["        moved = {name: weights[name].clone() for name in STATISTICS}"] if moves_twice else []),
        f"        {backward}",
        *(["        put_back(weights, moved)  # the backward ran blocks again"] if moves_twice else []),
        "        loss = loss + share.detach()",
        *(_rounds_for_others(run) if together else []),
        "    return loss",
    ]
    return "\n".join(lines) + "\n"


def _rounds_for_others(forward: Sequence[str]) -> list[str]:
    """Forwards that count for nothing here."""
    return [
        "    for _ in range(idle):  # a process with more rows gathers weights from all",
        "        part = {name: tensor.new_ones((1, *tensor.shape[1:])) for name, tensor in batch.items()}",
        *(f"        {line}" for line in forward),
        "        (0.0 * output).sum().backward()",
    ]


def statistics_source(statistics: Sequence[str]) -> str:
    """`STATISTICS`, what the forward itself writes, and what puts it back."""
    first, *rest = names_list(statistics)
    return "\n".join([f"STATISTICS = {first}", *rest, "", "", *PUT_BACK]).rstrip() + "\n"


def step_source(
    plan: StepPlan, events: EventSource, statistics: Sequence[str] = (), observes: bool = False,
    functions: tuple[str, str] = ("gradients", "schedule"), several: bool = False, suffix: str = "",
) -> str:  # fmt: skip
    """`train_step`, with a numbered comment for each mark of the step's clock that this program uses.

    `statistics` are what the forward itself writes; `observes`: the optimizer sees outputs in place of gradients.
    `functions` are the names of those that it calls; with `several` blocks the rate is that of the step in its block.
    """
    gradients, schedule = functions
    scaled, added = plan.precision == "float16", bool(events.calls["penalty"])
    more = ", added.detach()" if added else ""
    put_back = ["        put_back(weights, running)"] if statistics else []
    head = [
        f"def train_step{suffix}(",
        "    weights: Weights,",
        "    optimizer: torch.optim.Optimizer,",
        "    batch: dict[str, Tensor],",
        "    step: int,",
        "    steps: int,",
        *(["    first: int,", "    count: int,"] if several else []),
        *(["    scaler: torch.amp.GradScaler,"] if scaled else []),
        f") -> tuple[Tensor, Tensor | None, bool{', Tensor' if added else ''}]:",
        '    """Optimizer step number `step` (from 0) of `steps`: its loss, gradient norm, and whether it was taken'
        + ("; its penalty." if added else "."),
        "",
        *(["    The `count` steps of the block begin with step `first`; its schedule counts them."] if several else []),
        *(["    Nobody asks for the norm without `clip`: it is None."] if plan.clip is None else []),
        "    A loss that is not finite changes nothing on the CPU; on a GPU the caller looks at it.",
        *(["    Gradients that overflow in float16 change nothing but the loss scale."] if scaled else []),
        '    """',
    ]
    lines: list[str] = []
    if scaled or plan.clip is not None:
        lines.append('    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]')
    if events.keeps:
        lines += ["", "    # 1. keep what the events compare with", *_in(events.keeps)]
    lines += _phase(events, "start", "1. before anything is changed")
    lines += _phase(events, "before forward", "2. before the forward")
    if statistics:
        lines += ["", "    # a step that is not taken leaves the running statistics alone too"]
        lines.append("    running = {name: weights[name].clone() for name in STATISTICS}")
    extra = ", scaler" if scaled else ", optimizer" if observes else ""
    lines += [
        "",
        "    # 3. forward and backward, 4. summed over the processes of the run",
        f"    loss = step_over_processes({gradients}(weights, batch{extra}), optimizer)",
        *(_penalty(scaled, bool(plan.frozen)) if added else []),
        f"    if not loss.is_cuda and not torch.isfinite(loss{' + added' if added else ''}):",
        "        optimizer.zero_grad()",
        *put_back,
        f"        return loss{' + added' if added else ''}, None, False{more}",
    ]
    if scaled:
        lines += [
            "",
            "    # unscale; a step whose gradients are not finite is skipped",
            "    scaler.unscale_(optimizer)",
            "    found = [parameter.grad for parameter in trained if parameter.grad is not None]",
            "    if not torch.isfinite(torch.nn.utils.get_total_norm(found)):",
            "        scaler.update()",
            "        optimizer.zero_grad()",
            *put_back,
            f"        return loss, None, False{more}",
        ]
    lines += _phase(events, "after backward", "5. after the backward")
    if plan.clip is not None:
        lines += [
            "",
            "    # 6. clip the norm of all gradients together",
            f"    norm = torch.nn.utils.clip_grad_norm_(trained, {plan.clip})",
        ]
    lines += [
        "",
        "    # 7. optimizer, at the scheduled rate",
        "    for group in optimizer.param_groups:",
        f'        group["lr"] = group["base_lr"] * {schedule}({"step - first, count" if several else "step, steps"})',
        *(["    scaler.step(optimizer)", "    scaler.update()"] if scaled else ["    optimizer.step()"]),
    ]
    lines += _phase(events, "after step", "8. after the step")
    norm = "None" if plan.clip is None else "norm"
    lines += ["", "    # 9. clear the gradients", "    optimizer.zero_grad()", f"    return loss, {norm}, True{more}"]
    return "\n".join([*head, *(lines if lines[0] else lines[1:])]) + "\n"


def _penalty(scaled: bool, rests: bool) -> list[str]:
    """Once per step, behind the sum over processes: each of them computes the same; `rests`: of what need not move."""
    backward = f"{'scaler.scale(added)' if scaled else 'added'}.backward()"
    moves = ["    if added.requires_grad:  # of tensors that rest here it has none", f"        {backward}"]
    return ["    added = penalty(weights, step, steps)", *(moves if rests else [f"    {backward}"])]


def _phase(events: EventSource, phase: str, title: str) -> list[str]:
    calls = events.calls[phase]
    return ["", f"    # {title}", *_in(calls)] if calls else []


def _in(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
