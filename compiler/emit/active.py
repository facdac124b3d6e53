"""`active = random(n, every = k)` in step.py: which gradients are taken away behind the backward."""

from __future__ import annotations

from surgery.compiler.emit.body import wrapped
from surgery.compiler.emit.tables import names_list
from surgery.compiler.plan import Plan

IMPORTS = {"rest": "from surgery.compiler.kernels.active import rest"}


def active_source(plan: Plan) -> tuple[list[str], list[str]]:
    """Tables of the sites of such rules, and the statements of a step."""
    definitions, lines = [], []
    for number, rule in enumerate(plan.active):
        sites = [site for site in plan.sites if site.rule == rule.rule]
        moved = (tensor for site in sites for tensor in site.tensors if tensor.role == "train")
        own = list(dict.fromkeys(tensor.name for tensor in moved if not tensor.key.startswith("shared.")))
        if not own:  # in a `step` block where all of them rest
            continue
        table = f"RESTING_{number + 1}" if len(plan.active) > 1 else "RESTING"
        homes = [
            next(tensor.key for tensor in site.tensors if tensor.name == own[0]).removesuffix(f".{own[0]}")
            for site in sites
        ]
        first, *more = names_list(homes)
        definitions.append("\n".join([f"{table} = {first}", *more]) + "\n")
        tensors = ", ".join(f'weights[f"{{site}}.{name}"]' for name in own)
        lines.append(f"# {rule.place.file}:{rule.place.line}: {rule.count} of {rule.sites} weights learn at a time")
        seed = f'"{plan.step.seed} {rule.rule}"'
        lines += wrapped(f"rest([[{tensors}] for site in {table}], {rule.count}, step // {rule.every}, {seed})")
    return definitions, lines
