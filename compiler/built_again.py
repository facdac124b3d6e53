"""Matrices of W's size that a method forms, `W + B A` or a masked product, where a model is spread over processes.

Kept for the backward, those of all sites together are a whole model on each process, and more. So there the backward
builds them a second time, one site after the other, from the W that is gathered for it.
"""

from __future__ import annotations

import torch

from surgery.compiler.algebra.cost import keeps_matrix
from surgery.compiler.algebra.instance import instance
from surgery.compiler.plan import Plan, Site


def built_again(plan: Plan) -> tuple[Site, ...]:
    """The sites that would keep such a matrix; not those of a block whose whole forward runs again anyway."""
    known: dict[tuple[str, ...], bool] = {}

    def keeps(site: Site) -> bool:
        way = (site.strategy, site.module_class, site.operation)
        if site.module_class in ("Experts", "Parameter"):  # in module scope a parameter that is computed
            way = ("fold", "Linear", "")
        key = (site.formula, site.dtype, *way)
        if key not in known:
            strategy, kind, operation = way
            dtype = getattr(torch, site.dtype)
            known[key] = keeps_matrix(instance(plan, site.formula), strategy, plan.tokens, dtype, kind, operation)
        return known[key]

    return tuple(
        site for site in plan.sites
        if not any(site.path.startswith(f"{block}.") for block in plan.recomputed)
        and site.module_class not in ("Norm", "Module") and keeps(site)
    )  # fmt: skip
