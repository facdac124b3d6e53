"""The weights that an adapter of peft would change, each with its factors, and why others cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from surgery.compiler.algebra.base import dense, logical
from surgery.compiler.algebra.change import NotNarrow
from surgery.compiler.diagnostics import Diagnostics, Note, fail
from surgery.compiler.plan import Site
from surgery.compiler.weights import Layout, module_layout
from surgery.runtime.export import Exportable, Factors, factors_of

MODULES = ("Linear", "Conv1D", "Embedding", "Conv2d")  # what peft adapts by the names of modules
PARAMETERS = ("Experts", "Parameter")  # and by the names of parameters
HELP = "merge instead: `surgery merge RUN -o DIR`"
SHOWN = 6  # sites that a message lists

ReadFactors = Callable[[Exportable, Site], Factors]


@dataclass(frozen=True)
class Target:
    """A weight that peft adapts: that of a site, or one that is tied to it."""

    site: Site
    name: str  # of the module, or of the parameter
    module_class: str
    factors: Factors

    @property
    def is_module(self) -> bool:
        """Whether peft finds it by the name of its module."""
        return self.module_class in MODULES


@dataclass
class Refused:
    """Sites that cannot be exported, by the rule and the reason."""

    step: Exportable
    sites: dict[tuple[int, str], list[Site]] = field(default_factory=dict)

    def add(self, site: Site, reason: str) -> None:
        """Refuse a site."""
        self.sites.setdefault((site.rule, reason), []).append(site)

    def report(self, found: Diagnostics) -> None:
        """One SURG064 for each rule and reason, with the sites."""
        for (_, reason), sites in self.sites.items():
            first, paths = sites[0], [f"`{site.path}`" for site in sites[:SHOWN]]
            more = f" and {len(sites) - SHOWN} more" if len(sites) > SHOWN else ""
            help = HELP if first.facts.merges else "`surgery.apply(RUN, model)` adapts a model in Python"
            note = Note(f"{len(sites)} {'site' if len(sites) == 1 else 'sites'}: {', '.join(paths)}{more}")
            message = f"`{first.method}` is no LoRA of peft here: {reason}"
            found.error("SURG064", message, self.step.plan.span(first.place), notes=[note], help=help)


def targets_of(refused: Refused, step: Exportable, factors: ReadFactors = factors_of) -> list[Target]:
    """What peft has to adapt for each site: its weight, and what is tied to it if the site is all of them.

    `factors` says how a site's weight differs from the model's own.
    """
    targets: list[Target] = []
    for site in step.plan.sites:
        try:
            targets += _targets(step, site, factors)
        except NotNarrow as reason:
            refused.add(site, str(reason))
    if not any(target.factors.scale is not None for target in targets):
        return targets
    for number, target in enumerate(targets):
        try:
            targets[number] = _scaled(step, target)
        except NotNarrow as reason:
            refused.add(target.site, str(reason))
    return targets


def _targets(step: Exportable, site: Site, read: ReadFactors) -> list[Target]:
    if site.module_class == "Norm":
        raise NotNarrow("peft adapts no norms")
    if site.experts == 1:
        raise NotNarrow("peft takes a stack of one expert for a matrix")
    factors = read(step, site)
    if site.module_class in PARAMETERS:
        return [Target(site, site.parameter, site.module_class, factors)]
    owner = site.parameter.rpartition(".")[0]
    model = step.model
    weight, module = model.get_parameter(site.parameter), model.get_submodule(owner)
    paths = [path for path, other in model.named_modules(remove_duplicate=False) if other is module]
    if len(paths) > 1:
        raise NotNarrow(
            f"one module has the names {', '.join(f'`{path}`' for path in paths)}, and peft adapts one of them"
        )
    found = [Target(site, owner, site.module_class, factors)]
    if site.untied:
        return found
    for path, other in model.named_modules():
        if other is module or getattr(other, "weight", None) is not weight:
            continue
        layout = module_layout(other)
        if not isinstance(layout, Layout) or layout.module_class not in MODULES or factors.scale is not None:
            raise NotNarrow(f"its weight is tied to that of `{path}`")
        turned = replace(factors, left=factors.right.mT, right=factors.left.mT)
        same = layout.transposed == site.transposed
        found.append(Target(site, path, layout.module_class, factors if same else turned))
    return found


def _scaled(step: Exportable, target: Target) -> Target:
    """With the scale of its rows, one if it has none: peft's DoRA is one setting for all."""
    site, factors = target.site, target.factors
    if target.module_class in (*PARAMETERS, "Embedding"):
        raise NotNarrow("some rows of weights are scaled, which peft's DoRA does for linears and convolutions alone")
    scale = torch.ones(site.shape[0], dtype=torch.float64) if factors.scale is None else factors.scale
    return replace(target, factors=replace(factors, scale=scale))


def magnitude(step: Exportable, target: Target, left: Tensor, right: Tensor) -> Tensor:
    """DoRA's vector `[out]`: the norms of the rows of the adapted weight, for the factors as they are stored."""
    own = dict(step.model.named_parameters(remove_duplicate=False))
    weight = logical(dense(target.site, own), target.site).to(left.device)
    norms = torch.linalg.vector_norm(weight.double() + left.double() @ right.double(), dim=-1)
    if bool((norms == 0).any()):
        message = f"a row of the weight of `{target.name}` is zero, and peft divides by its norm"
        raise fail("SURG064", message, step.plan.span(target.site.place), help=HELP)
    assert target.factors.scale is not None
    vector: Tensor = target.factors.scale * norms
    return vector
