"""The `step` blocks: settings by name, each with its kind, to the plan's record; and what it says against the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.compiler import nodes
from surgery.compiler.algebra.quantity import LARGEST
from surgery.compiler.diagnostics import Diagnostics, Note, did_you_mean, fail
from surgery.compiler.plan import (
    DataPlan,
    ModelPlan,
    OptimizerPlan,
    RecomputePlan,
    ReportPlan,
    SchedulePlan,
    StepPlan,
)
from surgery.compiler.printer import show
from surgery.compiler.settings import (
    DTYPES,
    Reader,
    arguments,
    at_least,
    call,
    place,
    read_settings,
    share,
    text,
    variant,
    whole,
    word,
)
from surgery.compiler.span import Span
from surgery.optimizers import BASES, OPTIMIZERS, Kind

# What an evaluation says, by what a task's labels are.
TOKENS = ("loss", "perplexity")
CLASSES = ("loss", "accuracy", "f1", "matthews")
NUMBERS = ("loss", "pearson", "spearman")
SCORES = tuple(dict.fromkeys((*TOKENS, *CLASSES, *NUMBERS)))


def _optimizer(node: nodes.Expr) -> OptimizerPlan:
    given = call(node)
    if given.function not in OPTIMIZERS:
        known = did_you_mean(given.function, OPTIMIZERS)
        raise fail("SURG002", f"there is no optimizer `{given.function}`", node.span, help=known)
    kind = OPTIMIZERS[given.function]
    if kind.around:
        return _around(kind, given)
    inner = given.arguments[0].value if given.arguments else None
    if isinstance(inner, nodes.Call) and inner.function in OPTIMIZERS:
        message = f"`{given.function}` is around no other optimizer"
        raise fail("SURG004", message, inner.span, help=f"it takes {', '.join(kind.arguments)}")
    values = arguments(given, kind.arguments)
    if values.get("nesterov") and not values.get("momentum"):
        raise fail("SURG004", "nesterov needs a momentum", node.span)
    if "lr" not in values and "lr" in kind.arguments:
        raise fail(
            "SURG004", f"`{given.function}` needs a learning rate", node.span, help=f"{given.function}(lr = 1e-3)"
        )
    values = {**kind.defaults, **values}
    options = {name: values.pop(name) for name in list(values) if name not in OptimizerPlan.model_fields}
    base = given.function if given.function in BASES else "sgd" if kind.needs == "jacobian" else "adamw"
    return OptimizerPlan.model_validate({"name": kind.name, "base": base, "options": options, **values})


def _around(kind: Kind, given: nodes.Call) -> OptimizerPlan:
    """An optimizer around another, which is its first argument: `riemannian(adamw(lr = 1e-3), damping = 1e-6)`."""
    first = given.arguments[0] if given.arguments else None
    inner = first.value if first is not None and first.name is None else None
    if not isinstance(inner, nodes.Call) or inner.function not in kind.around:
        message = f"`{kind.name}` is around another optimizer: {' or '.join(kind.around)}"
        where = given.span if inner is None else inner.span
        raise fail("SURG004", message, where, help=f"{kind.name}({kind.around[0]}(lr = 1e-3))")
    values = arguments(nodes.Call(given.function, given.arguments[1:], span=given.span), kind.arguments)
    return _optimizer(inner).model_copy(update={"name": kind.name, "options": {**kind.defaults, **values}})


def _schedule(node: nodes.Expr) -> SchedulePlan:
    kinds: dict[str, dict[str, Reader]] = {
        "constant": {"warmup": at_least(0)},
        "linear": {"warmup": at_least(0), "minimum": at_least(0, below=1)},
        "cosine": {"warmup": at_least(0), "minimum": at_least(0, below=1)},
    }
    name, values = variant(node, kinds, "there is no schedule")
    return SchedulePlan.model_validate({"name": name, **values})


def _recompute(node: nodes.Expr) -> RecomputePlan:
    name, values = variant(node, {"none": {}, "blocks": {}, "budget": {"share": share}}, "`recompute` knows no")
    if name == "budget" and not values:
        raise fail("SURG004", "`budget` needs the share that may be kept", node.span, help="budget(0.5)")
    kept = values["share"] if values else float(name == "none")
    return RecomputePlan.model_validate({"name": name, "share": kept, "place": place(node.span)})


def _stop(node: nodes.Expr) -> int:
    if not isinstance(node, nodes.Call) or node.function != "patience":
        raise fail("SURG002", f"`patience(3)` is meant, not `{show(node)}`", node.span)
    values = arguments(node, {"evaluations": whole(1)})
    if not values:
        raise fail("SURG004", "say after how many evaluations without a better one: `patience(3)`", node.span)
    found: int = values["evaluations"]
    return found


def _report(node: nodes.Expr) -> ReportPlan:
    project: dict[str, Reader] = {"project": text}
    name, values = variant(node, {"tensorboard": {}, "wandb": project, "trackio": project}, "`report` knows no")
    return ReportPlan.model_validate({"name": name, "place": place(node.span), **values})


def _every(*more: str) -> Reader:
    def read(node: nodes.Expr) -> dict[str, int]:
        if isinstance(node, nodes.Call) and node.function != "every":
            raise fail("SURG002", f"`every(100)` is meant, not `{show(node)}`", node.span)
        if not isinstance(node, nodes.Call):
            return {"every": whole(1)(node)}
        readers: dict[str, Reader] = {"every": whole(1), **dict.fromkeys(more, whole(1))}
        values = arguments(node, readers)
        if "every" not in values:
            raise fail("SURG004", "say how often: `every(100)`", node.span)
        return values

    return read


STEP: dict[str, Reader] = {
    "optimizer": _optimizer,
    "schedule": _schedule,
    "batch": whole(1),
    "micro_batch": whole(1),
    "steps": whole(1),
    "epochs": at_least(0, above=True),
    "clip": at_least(0, above=True),
    "precision": word("model", "bfloat16", "float16"),
    "adapter_dtype": word(*DTYPES),
    "seed": whole(0, LARGEST),
    "compile": word("auto", "on", "off", "reduce_overhead"),
    "loss": word("auto", "causal_lm", "cross_entropy", "mse", "output"),
    "evaluate": _every(),
    "save": _every("keep"),
    "log": _every(),
    "recompute": _recompute,
    "best": word(*SCORES),
    "stop": _stop,
    "report": _report,
}


# Arguments of a setting that are often taken for settings.
INSIDE = {
    **dict.fromkeys(
        ("lr", "weight_decay", "betas", "eps", "momentum"),
        "it is an argument of the optimizer: `optimizer = adamw(lr = 1e-3, weight_decay = 0.01)`",
    ),
    **dict.fromkeys(
        ("warmup", "minimum"), "it is an argument of the schedule: `schedule = linear(warmup = 0.1, minimum = 0.01)`"
    ),
}
# Settings of the whole run: one graph, one set of tensors, one loss, one folder.
WHOLE_RUN = ("precision", "adapter_dtype", "seed", "compile", "loss", "recompute", "best", "stop", "report")
OWN = ("steps", "epochs")  # what a later block does not take from the one before it


def read_steps(items: Sequence[nodes.Step], diagnostics: Diagnostics) -> tuple[StepPlan, ...]:
    """The `step` blocks; what a later one leaves out is as in the one before it."""
    blocks: list[StepPlan] = []
    values: dict[str, Any] = {}
    for number, item in enumerate(items or [nodes.Step()]):
        read = read_settings(item.settings, STEP, "step", diagnostics, INSIDE)
        spans = {line.name: line.span for line in item.settings if isinstance(line, nodes.Setting)}
        for name in WHOLE_RUN if number else ():
            if name in read:
                message = f"`{name}` is a setting of the whole run, and not of one block"
                notes = [Note("the first block", items[0].span)]
                diagnostics.error("SURG004", message, spans[name], notes=notes, help="write it in the first block")
        values = {name: value for name, value in values.items() if name not in OWN}
        values |= {name: value for name, value in read.items() if value is not None}
        _check(values, spans, item.span, diagnostics)
        save = values.get("save", {})
        intervals = {name: values[name]["every"] for name in ("evaluate", "log") if name in values}
        settings = values | intervals | {"save": save.get("every"), "keep": save.get("keep"), "number": number}
        blocks.append(StepPlan(**settings))
    return tuple(blocks)


def _check(values: dict[str, Any], spans: Mapping[str, Span | None], block: Span | None, found: Diagnostics) -> None:
    """What the settings of a block say against each other, at the line of the block that does, or at the block."""
    if "steps" in values and "epochs" in values:
        found.error("SURG004", "`steps` and `epochs` exclude each other", spans["epochs"], help="keep one of them")
    if values.get("micro_batch", 1) > values.get("batch", StepPlan().batch):
        where = spans.get("micro_batch", spans.get("batch", block))
        known = "that of the block before" if "micro_batch" not in spans else "this one"
        help_text = f"write `micro_batch = {values.get('batch', StepPlan().batch)}` or less"
        message = f"a micro-batch is a part of the batch, {known} is larger"
        found.error("SURG004", message, where, help=help_text)
    if "optimizer" in values:
        _check_optimizer(values, spans, block, found)
    if "evaluate" not in values:
        for name in ("best", "stop"):
            if name in spans:
                message = f"`{name}` chooses among evaluations during the run, and there are none"
                found.error("SURG004", message, spans[name], help="evaluate = every(100)")
    if "stop" in values:
        values.setdefault("best", "loss")


def _check_optimizer(
    values: dict[str, Any], spans: Mapping[str, Span | None], block: Span | None, diagnostics: Diagnostics
) -> None:
    """An optimizer that reads a Jacobian sees no gradients that could be clipped, scaled or recorded."""
    optimizer: OptimizerPlan = values["optimizer"]
    if OPTIMIZERS[optimizer.name].needs != "jacobian":
        return
    for name, refused in (("clip", None), ("precision", "float16"), ("compile", "reduce_overhead")):
        if name in values and refused in (None, values[name]):
            message = f"`{optimizer.name}` reads how outputs depend on what is trained, and no gradients of a loss"
            where = spans.get(name, spans.get("optimizer", block))
            diagnostics.error("SURG004", message, where, help=f"leave `{name}` out")


def scores_of(model: ModelPlan | None) -> tuple[str, ...]:
    """What an evaluation of a model says; all that there is where its task does not tell yet."""
    if model is None or model.task is None:
        return SCORES
    if model.task == "sequence_classification":
        return {None: CLASSES + NUMBERS[1:], 1: NUMBERS}.get(model.labels, CLASSES)
    return TOKENS if model.task == "causal_lm" else ("loss",)


def check_step(
    tree: nodes.Tree, model: ModelPlan | None, data: DataPlan | None, step: StepPlan, diagnostics: Diagnostics
) -> None:
    """What the step block says against the model's task and the data: a best state is chosen by what is evaluated."""
    settings = [line for item in tree.items if isinstance(item, nodes.Step) for line in item.settings]
    spans = {line.name: line.span for line in settings if isinstance(line, nodes.Setting)}
    held_out = data is None or data.holdout or data.eval or data.eval_split
    if step.best is None:
        if "evaluate" in spans and not held_out:
            message = "nothing is evaluated: no rows are held out"
            help_text = "write holdout = 0.1 or eval = FILE in the data block, or leave `evaluate` out"
            diagnostics.warn("SURG004", message, spans["evaluate"], help=help_text)
        return
    where = spans.get("best", spans.get("stop"))
    if step.best not in (known := scores_of(model)):
        assert model is not None
        message = f"an evaluation of a model with the task {model.task} says no {step.best}"
        diagnostics.error("SURG031", message, where, help=f"there are: {', '.join(known)}")
    if not held_out:
        help_text = "write holdout = 0.1 or eval = FILE in the data block"
        message = "the best state is that of an evaluation, and no rows are held out for one"
        diagnostics.error("SURG004", message, where, help=help_text)
