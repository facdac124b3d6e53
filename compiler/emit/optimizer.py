"""The text of step.py that makes the optimizer: what is trained at which rates, and what the optimizer knows of it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.compiler.diagnostics import fail
from surgery.compiler.emit.tables import names_list
from surgery.compiler.plan import FactorsPlan, OptimizerPlan
from surgery.optimizers import OPTIMIZERS

# classes that step.py calls, by their names
CLASSES = {kind.made.__name__: kind.made for kind in OPTIMIZERS.values() if inspect.isclass(kind.made)}
IMPORTS = {name: f"from {made.__module__} import {name}" for name, made in CLASSES.items()} | {
    "Factors.of": "from surgery.optimizers.factors import Factors"
}
_LOKO = "from surgery.optimizers.loko import"
OBSERVED = {  # what an optimizer that reads a Jacobian takes for outputs, by the loss
    "cross_entropy": "class_outputs", "mse": "number_outputs", "binary": "label_outputs", "next_token": "token_outputs",
}  # fmt: skip
IMPORTS |= {name: f"{_LOKO} {name}" for name in OBSERVED.values()}


@dataclass(frozen=True)
class Group:
    """Trained tensors with one learning rate and weight decay."""

    names: tuple[str, ...]
    lr: float
    weight_decay: float


def rates(optimizer: OptimizerPlan, factors: Sequence[FactorsPlan]) -> dict[str, float]:
    """What the optimizer multiplies the learning rates of tensors with, by key; 1 for all that are not there."""
    made = OPTIMIZERS[optimizer.name].made
    found: dict[str, float] = {} if inspect.isclass(made) else made(factors, **optimizer.options)
    return found


def optimizer_source(
    optimizer: OptimizerPlan, groups: Sequence[Group], factors: Sequence[FactorsPlan] = (), rounds: bool = False,
    rests: bool = False, several: bool = False, suffix: str = "",
) -> str:  # fmt: skip
    """`TRAINED` tables and `make_optimizer`; with `rounds`, bfloat16 is trained and rounded stochastically.

    `rests`: some tensors have no gradients in some steps. With `several` blocks what others train has none in this one.
    """
    lines: list[str] = []
    tables = []
    for number, group in enumerate(groups):
        table = f"TRAINED{suffix.upper()}" + (f"_{number + 1}" if len(groups) > 1 else "")
        first, *rest = names_list(group.names)
        lines += [f"{table} = {first}", *rest]
        tables.append((table, group))
    made = OPTIMIZERS[optimizer.name].made
    needs = OPTIMIZERS[optimizer.name].needs
    around = made if inspect.isclass(made) and needs not in (None, "jacobian") else None
    if around is not None:
        lines += ["", *_table(factors, f"FACTORS{suffix.upper()}")]
    kind, options = _base(optimizer)
    rounded = ", bfloat16 rounded stochastically" if rounds else ""
    title = f"{kind} over what is trained{rounded}; `base_lr` is the rate that the schedule scales."
    if needs == "jacobian":
        title = f"{made.__name__} over what is trained; `base_lr` is what the schedule scales."
    if several:
        title = title.replace("is trained", "this block trains", 1)
    lines += [
        "", "", f"def make_optimizer{suffix}(weights: Weights) -> torch.optim.Optimizer:", f'    """{title}"""',
        "    groups: list[dict[str, Any]] = [",
    ]  # fmt: skip
    for table, group in tables:
        rates = f'"lr": {group.lr}, "base_lr": {group.lr}, "weight_decay": {group.weight_decay}'
        lines.append(f'        {{"params": [weights[name] for name in {table}], {rates}}},')
    lines += ["    ]", *(["    learn(weights, groups)"] if several else [])]
    own = "".join(f", {name}={value!r}" for name, value in optimizer.options.items())
    gives = "return" if around is None else "base ="
    if needs == "jacobian":
        names = ", ".join(f"*{table}" for table, _ in tables)
        lines.append(f"    return {made.__name__}(groups, [{names}]{own})")
    elif rounds:
        lines.append(f"    {gives} Rounding{kind}(groups, {options})")
    elif rests and optimizer.momentum:  # fused, it wants momenta of all or of none
        lines.append(f"    {gives} torch.optim.{kind}(groups, {options}, foreach=False)")
    else:
        lines += [
            '    devices = {parameter.device.type for group in groups for parameter in group["params"]}',
            '    fused = devices <= {"cpu", "cuda"}  # in one pass: on a CPU too it takes a third of the time',
            f"    {gives} torch.optim.{kind}(groups, {options}, foreach=False, fused=fused)",
        ]
    if around is not None:
        lines += [
            f"    factors = [Factors.of(weights, *entry) for entry in FACTORS{suffix.upper()}]",
            f"    return {around.__name__}(base, factors{own})",
        ]
    return "\n".join(lines) + "\n"


def observed(optimizer: OptimizerPlan, loss: str) -> str:
    """The outputs and targets that the optimizer reads, as step.py computes them from a part's; empty for most.

    `loss` is the name of the step's.
    """
    if OPTIMIZERS[optimizer.name].needs != "jacobian":
        return ""
    if loss not in OBSERVED:
        message = f"`{optimizer.name}` reads outputs and their targets, and the loss is the module's own"
        raise fail("SURG039", message, help="write `loss = mse` or `loss = cross_entropy` in the step block")
    tokens = f", {optimizer.options['tokens']}" if loss == "next_token" else ""
    return f'{OBSERVED[loss]}(output, part["labels"]{tokens})'


def _base(optimizer: OptimizerPlan) -> tuple[str, str]:
    """Torch's name of the optimizer of everything else, and its arguments."""
    if optimizer.base == "sgd":
        return "SGD", f"momentum={optimizer.momentum}" + (", nesterov=True" if optimizer.nesterov else "")
    return "AdamW", f"betas={optimizer.betas}, eps={optimizer.eps}"


def _table(factors: Sequence[FactorsPlan], name: str) -> list[str]:
    """`FACTORS`: names of tensors that are read as one product, from left to right, and the number in front of it."""
    alike: dict[str, list[str]] = {}
    for product in factors:
        below = f"{product.site}."
        names = [
            f'f"{{site}}.{key.removeprefix(below)}"' if key.startswith(below) else f'"{key}"' for key in product.tensors
        ]
        turned = f", {product.turned}" if any(product.turned) else ""
        alike.setdefault(f"(({', '.join(names)}), {product.scale}{turned})", []).append(product.site)
    lines = [f"{name} = [  # tensors that are read only as their product, and what is in front of it"]
    for entry, sites in alike.items():
        first, *rest = names_list(sites)
        lines += [f"    *({entry} for site in {first}", *(f"    {line}" for line in rest[:-1]), f"    {rest[-1]}),"]
    return [*lines, "]"]
