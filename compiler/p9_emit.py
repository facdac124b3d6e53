"""Pass 9: plan and graph to the source of step.py, the training step that runs; and of graph.py, its forward alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx

from surgery.compiler.diagnostics import fail
from surgery.compiler.emit.active import IMPORTS as IMPORTS_OF_ACTIVE
from surgery.compiler.emit.active import active_source
from surgery.compiler.emit.again import Again
from surgery.compiler.emit.blocks import LEARN, Functions, blocks_source
from surgery.compiler.emit.body import wrapped
from surgery.compiler.emit.events import IMPORTS as IMPORTS_OF_EVENTS
from surgery.compiler.emit.events import event_source
from surgery.compiler.emit.forward import Forward, forward_source
from surgery.compiler.emit.imports import IMPORTS as IMPORTS_OF_GRAPHS
from surgery.compiler.emit.loss import IMPORTS as IMPORTS_OF_LOSS
from surgery.compiler.emit.loss import is_by_rows, loss_text
from surgery.compiler.emit.optimizer import IMPORTS as IMPORTS_OF_OPTIMIZERS
from surgery.compiler.emit.optimizer import Group, observed, optimizer_source, rates
from surgery.compiler.emit.template import (
    COMPILE_BLOCKS,
    COMPILE_WHOLE,
    COMPILED,
    CUT_PADDING,
    HEADER,
    MAIN,
    gradients_source,
    schedule_source,
    statistics_source,
    step_source,
)  # fmt: skip
from surgery.compiler.emit.template import IMPORTS as IMPORTS_OF_STEPS
from surgery.compiler.event_program import EventProgram
from surgery.compiler.events import programs
from surgery.compiler.graph import Graph, tensors
from surgery.compiler.plan import Plan
from surgery.runtime import losses
from surgery.runtime.ownership import running_statistics

# by the name that is called
IMPORTS = (
    IMPORTS_OF_GRAPHS
    | IMPORTS_OF_LOSS
    | IMPORTS_OF_OPTIMIZERS
    | IMPORTS_OF_STEPS
    | IMPORTS_OF_EVENTS
    | IMPORTS_OF_ACTIVE
)


def run(
    plan: Plan, graph: Graph, events: Sequence[EventProgram] | None = None, model: Forward | None = None,
    *, whole_logits: bool = False,
) -> str:  # fmt: skip
    """The source of step.py; `events` are the plan's own if left out.

    In module scope `model` is the forward, and of the graph only inputs and tensors are read. With `whole_logits` the
    loss takes no chunks of them.

    It needs torch, and of surgery the kernels alone; it defines `forward`, the loss, `make_optimizer`, `schedule`,
    `gradients` and `train_step`, and what `emit.blocks` says of several `step` blocks. Raises SurgError: SURG031 if
    nothing says what the loss is, SURG040 if the graph holds what is no Python.
    """
    again = Again.of(plan)
    chosen = chosen_loss(plan, graph)
    blocks = plan.blocks
    outputs = [observed(block.step.optimizer, chosen.loss.name) for block in blocks]
    by_rows = chosen.output is None and not (any(outputs) or whole_logits) and is_by_rows(chosen.loss, graph)
    forward = model or forward_source(graph, plan.step.precision != "model", again, by_rows)
    loss = loss_text(chosen.loss, chosen.output, chosen.labels, forward.head)
    happenings = event_source(programs(plan) if events is None else events)
    resting = [active_source(block) for block in blocks]
    happenings.definitions += dict.fromkeys(table for tables, _ in resting for table in tables)
    statistics, several = running_statistics(graph), len(blocks) > 1
    optimizers, steps = Functions(), Functions()
    for block, observes, (_, rests) in zip(blocks, outputs, resting, strict=True):
        step, groups, rates = block.step, _groups(block, graph), bool(block.active)
        optimizers.add("make_optimizer", step.number, partial(
            optimizer_source, step.optimizer, groups, block.factors, block.rounds, rates, several,
        ))  # fmt: skip
        rate = optimizers.add("schedule", step.number, partial(schedule_source, step.schedule))
        gradients = steps.add("gradients", step.number, partial(
            gradients_source, step, graph.inputs, loss, _cuts_padding(block, graph), bool(again and statistics),
            bool(model), observes,
        ))  # fmt: skip
        steps.add("train_step", step.number, partial(
            step_source, step, happenings.behind(rests), statistics, bool(observes), (gradients, rate), several,
        ))  # fmt: skip
    before = [CUT_PADDING] if any(_cuts_padding(block, graph) for block in blocks) else []
    if statistics:
        steps.texts.insert(1, statistics_source(statistics))
    parts = [
        _title("Forward") + forward.source,
        *([] if model else [_compile_source(forward, any(outputs))]),
        _title("Loss") + loss.source,
        _title("Optimizer and schedule") + "\n\n".join([*([LEARN] if several else []), *optimizers.texts]),
        *([_title("Events") + "\n\n".join(happenings.definitions)] if happenings.definitions else []),
        _title("The step") + "\n\n".join([*before, *steps.texts]),
        *([blocks_source(plan, optimizers, steps)] if several else []),
        *([] if model else [MAIN]),
    ]
    body = "\n\n".join(parts)
    text = f'"""{_documentation(plan, alone=model is None)}"""\n\n{_header(graph, body)}\n\n{body}'
    return text if "math." in text else text.replace("import math\n", "", 1)


def _cuts_padding(plan: Plan, graph: Graph) -> bool:
    """Whether micro-batches end at their last token. Elsewhere a later position may count: labels per token, images."""
    return (
        plan.step.micro_batch is not None
        and plan.model.task == "sequence_classification"
        and "attention_mask" in graph.inputs  # a mask may have been dropped
    )


def graph_source(plan: Plan, graph: Graph) -> str:
    """The source of graph.py: the adapted model's forward, to read."""
    forward = forward_source(graph, autocast=plan.step.precision != "model")
    title = f"The forward of {plan.model.architecture or 'the model'} as {Path(plan.file).name} adapts it."
    return "\n\n".join([f'"""{title}"""\n\n{_header(graph, forward.source)}', forward.source])


def _title(text: str) -> str:
    return f"# --- {text} " + "-" * (113 - len(text)) + "\n\n"


def _header(graph: Graph, body: str) -> str:
    """The imports of a text; operators of other libraries are there once those are imported."""
    used = {
        str(node.target).split(".")[0]
        for node in graph.module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }
    others = sorted(used - {"aten", "prim", "prims"})
    lines = [f"import {name}  # registers torch.ops.{name}" for name in others]
    header = HEADER.replace("import torch\n", "\n".join(["import torch", *lines]) + "\n", 1)
    if "Callable[" not in body:
        header = header.replace("from collections.abc import Callable\n", "", 1)
    needed = "".join(f"{line}\n" for name, line in IMPORTS.items() if f"{name}(" in body)
    return header.replace("from torch import Tensor\n", f"from torch import Tensor\n{needed}", 1) if needed else header


def _documentation(plan: Plan, alone: bool) -> str:
    """What this file is, of what, and how to run it `alone` if it can be."""
    spec = Path(plan.file).name
    what = plan.model.architecture or "the model"
    methods: dict[str, int] = {}
    for site in plan.sites:
        methods[site.method] = methods.get(site.method, 0) + 1
    lines = [f"One training step of {what}, written by surgery from {spec}.", ""]
    lines += [f"{count} weights adapted with {method}." for method, count in methods.items()]
    if plan.trained:
        lines.append(f"{len(plan.trained)} parameters of the model trained as they are.")
    lines += [f"Trained: {plan.totals.trainable:,} numbers; the model has {plan.totals.model:,}.", ""]
    lines += [
        "This is what runs: `surgery train` executes this text. Alone, beside its plan.json and adapters.safetensors:",
        "",
        "    python step.py --data FILE",
        "",
        "`weights` holds every tensor by its full name; a function for one block takes that block's own, as `w`.",
    ] if alone else [
        "This is what runs: `surgery train --scope module` executes this text around the adapted model.",
        "`weights` holds what is trained and what events read, by full names; W may be spread over processes by rows.",
    ]  # fmt: skip
    lines += [
        f"Comments such as `{spec}:7` name the line of the spec that a piece of code comes from.",
        "",
    ]
    return "\n".join(lines).replace("\\", "\\\\")


def _compile_source(forward: Forward, several: bool = False) -> str:
    """What compiles the forward; `several`: its backward is run more than once."""
    names = list(forward.block_functions) or ["hidden_states" if forward.head else "forward"]
    if forward.head and forward.head.pointwise:
        names.append("head")
    (row,) = [f"COMPILED = [{', '.join(repr(name) for name in names)}]".replace("'", '"')]
    compiled = COMPILED.replace("=False):", "=False, donated_buffer=False):") if several else COMPILED
    parts = ["\n".join(wrapped(row)) + "\n", compiled, COMPILE_BLOCKS if forward.block_functions else COMPILE_WHOLE]
    return "\n\n".join(parts)


@dataclass(frozen=True)
class ChosenLoss:
    """The step's loss, which of the module's outputs it reads, and the entry of the batch that it compares with."""

    loss: losses.Loss
    output: int | None  # None: the graph's output is the logits
    labels: str

    def total(self, output: Tensor, labels: Tensor) -> Tensor:
        """The sum over the labels, 0-d."""
        return self.loss.total(output, labels)

    def count(self, labels: Tensor) -> Tensor:
        """The number of labels, 0-d int64."""
        return self.loss.count(labels)


def chosen_loss(plan: Plan, graph: Graph) -> ChosenLoss:
    """The loss of the spec, of the task, or the module's own 0-d output; SURG031 if there is none of them."""
    scalar = _scalar_output(graph)
    loss = losses.choose(plan.step.loss, plan.model.task, plan.model.labels, plan.model.settings.get("problem_type"))
    if loss is None and scalar is not None:
        loss = losses.OUTPUT
    if loss is None:
        task = f"task {plan.model.task}" if plan.model.task else "a model without a task"
        raise fail("SURG031", f"nothing says what the loss of {task} is", help="write `loss = mse` in the step block")
    if loss is losses.OUTPUT and scalar is None:
        raise fail("SURG031", "`loss = output` needs a model that returns its loss, a tensor without axes")
    if loss is losses.OUTPUT:
        return ChosenLoss(loss, scalar, graph.inputs[0])
    return ChosenLoss(loss, None if graph.output == "logits" else 0, "labels")


def _scalar_output(graph: Graph) -> int | None:
    """The first output without axes, if the graph gives the module's own outputs."""
    if graph.output == "logits":
        return None
    output = next(node for node in graph.module.graph.nodes if node.op == "output")
    values = output.args[0]
    assert isinstance(values, (list, tuple))
    for number, node in enumerate(values):
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(value, torch.Tensor) and value.ndim == 0:
            return number
    return None


def trained_names(plan: Plan, graph: Graph) -> list[str]:
    """Every trained tensor once, under its first name, in the order of the plan."""
    named = tensors(graph.module)
    names = [tensor.key for site in plan.sites for tensor in site.tensors if tensor.role == "train"]
    names += [parameter.name for parameter in plan.trained]
    found: dict[int, str] = {}
    for name in dict.fromkeys(names):
        found.setdefault(id(named[name]), name)
    return list(found.values())


def _groups(plan: Plan, graph: Graph) -> list[Group]:
    own: dict[str, tuple[float | None, float | None]] = {}
    for site in plan.sites:
        for tensor in site.tensors:
            own.setdefault(tensor.key, (tensor.lr, tensor.weight_decay))
    for parameter in plan.trained:
        own[parameter.name] = (parameter.lr, parameter.weight_decay)
    optimizer = plan.step.optimizer
    faster = rates(optimizer, plan.factors)
    groups: dict[tuple[float, float], list[str]] = {}
    for name in trained_names(plan, graph):
        lr, decay = own[name]
        rate = optimizer.lr * faster.get(name, 1.0) if lr is None else lr
        groups.setdefault((rate, optimizer.weight_decay if decay is None else decay), []).append(name)
    return [Group(tuple(names), *key) for key, names in groups.items()]
