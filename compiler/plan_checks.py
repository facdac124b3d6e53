"""What of a spec does not go with its model, or with another line of it, though each line by itself is right."""

from __future__ import annotations

import inspect

from surgery.compiler import nodes
from surgery.compiler.algebra import instance
from surgery.compiler.algebra.event import gradients_read, reads_gradient
from surgery.compiler.algebra.formula import AT_START
from surgery.compiler.diagnostics import Diagnostics, Note
from surgery.compiler.plan import Plan, Site
from surgery.compiler.program import Program
from surgery.compiler.select import listed, select_parameters
from surgery.compiler.skeleton import Skeleton
from surgery.optimizers import OPTIMIZERS
from surgery.optimizers.factors import FactorOptimizer


def check_events(program: Program, plan: Plan, diagnostics: Diagnostics) -> None:
    """What events read of an optimizer, or want of it, that this one does not have."""
    kind = OPTIMIZERS[plan.step.optimizer.name]
    if kind.needs is None or not isinstance(kind.made, type):
        return
    whole = issubclass(kind.made, FactorOptimizer) and kind.made.start is not FactorOptimizer.start
    for rule in dict.fromkeys(site.rule for site in plan.sites):
        name, where = program.rules[rule].method.name, program.rules[rule].method_span
        formulas = (instance.instance(plan, site.formula) for site in plan.sites if site.rule == rule)
        changes = [(event.phase, change) for one in formulas for event in one.events for change in event.changes]
        if whole and any(change.operator == "reset" for _, change in changes):
            message = f"`{name}` resets a factor, and `{kind.name}` cannot forget it"
            help_text = "its state is that of the whole product: take riemannian, lora_plus, adamw or sgd"
            diagnostics.error("SURG032", message, where, help=help_text)
        phases = {phase for phase, change in changes if reads_gradient(change.value)}
        if kind.needs == "jacobian" and phases:
            message = f"`{name}` reads gradients of the loss, and `{kind.name}` has none"
            diagnostics.error("SURG039", message, where, help="take adamw or sgd")
        elif "after step" in phases:
            message = f"`{name}` reads gradients after the step, where `{kind.name}` has put others in their place"
            diagnostics.error("SURG032", message, where, help="read them `after backward`, or take adamw or sgd")


def check_frozen(program: Program, skeleton: Skeleton, plan: Plan, diagnostics: Diagnostics) -> None:
    """A W that `freeze` names stays as it is: a method whose steps write it is refused there."""
    for item in program.frozen:
        names = set(select_parameters(item.pattern, skeleton, Diagnostics()))
        moved = [site for site in plan.sites if site.update == "literal" and site.parameter in names]
        if moved:
            message = f"{listed([site.path for site in moved])}: frozen, and the rule moves W"
            notes = [Note("the rule", program.rules[moved[0].rule].method_span)]
            diagnostics.error("SURG032", message, item.span, notes=notes, help="subtract them with `except`")


def check_length(program: Program, skeleton: Skeleton, diagnostics: Diagnostics) -> None:
    """Rows must fit the model's table of positions: a longer one would fail in the middle of a run."""
    positions = skeleton.positions
    if program.data is None or positions is None or program.data.max_length <= positions:
        return
    settings = [setting for item in program.tree.items if isinstance(item, nodes.Data) for setting in item.settings]
    written = next((setting for setting in settings if setting.name == "max_length"), None)
    if written is not None:  # else the default is cut to the table
        message = f"`max_length` is {program.data.max_length}, the model has {positions} positions"
        help_text = f"write `max_length = {positions}` or less"
        diagnostics.error("SURG031", message, written.span, help=help_text)


def check_packed(program: Program, skeleton: Skeleton, diagnostics: Diagnostics) -> None:
    """Positions are what tells the documents of a row apart."""
    if program.data is None or not program.data.pack:
        return
    if "position_ids" not in inspect.signature(skeleton.model.forward).parameters:
        settings = [setting for item in program.tree.items if isinstance(item, nodes.Data) for setting in item.settings]
        written = next(setting for setting in settings if setting.name == "pack")
        message = f"{type(skeleton.model).__name__} takes no `position_ids`, which tell the documents of a row apart"
        diagnostics.error("SURG031", message, written.span, help="leave `pack = true` out")


def check_half(program: Program, block: Plan, diagnostics: Diagnostics) -> None:
    """AdamW divides by sqrt(v) + eps, and both are 0 in float16: what it trains there is NaN after two steps."""
    if block.step.optimizer.base != "adamw":
        return
    whole = [entry.name for entry in block.trained if entry.dtype == "float16"]
    tensors = [tensor for site in block.sites for tensor in site.tensors]
    own = [tensor.key for tensor in tensors if tensor.role == "train" and tensor.dtype == "float16"]
    for name, advice in ((whole[:1], "dtype = float32 with precision = float16"), (own[:1], "adapter_dtype = float32")):
        if name:
            node = program.moving[block.step.number].node
            message = f"`{name[0]}` is float16, where AdamW's eps is 0 and its steps are not numbers"
            span = (node or program.tree).span
            diagnostics.error("SURG032", message, span, help=f"write `{advice}`, or train with sgd")


def check_resting(program: Program, block: Plan, diagnostics: Diagnostics) -> None:
    """What events write, or read the gradient of, moves in every `step` block: they run in all of them."""
    node = program.moving[block.step.number].node
    for rule in dict.fromkeys(site.rule for site in block.sites):
        found = sorted(set[str]().union(*(_resting(block, site) for site in block.sites if site.rule == rule)))
        if found:
            name, where = program.rules[rule].method.name, program.rules[rule].method_span
            message = f"events of `{name}` write or read the gradients of {listed(found)}, which a block freezes"
            notes = [] if node is None else [Note("the block", node.span)]
            diagnostics.error("SURG032", message, where, notes=notes, help="let them move in every block")


def _resting(block: Plan, site: Site) -> set[str]:
    """Trained tensors of a site's method that rest in a block, and that its events write or read the gradients of."""
    formula = instance.instance(block, site.formula)
    rests = {tensor.name for tensor in site.tensors if tensor.role == "frozen"} & formula.trained
    changes = [change for event in formula.events if event.phase != AT_START for change in event.changes]
    needed = [{change.target} | gradients_read(change.value) for change in changes if rests]
    return rests & set[str]().union(*needed)
