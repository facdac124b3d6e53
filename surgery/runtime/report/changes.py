"""How far a run moved each weight: norms and singular values of delta, computed in float64 from the run's tensors.

Where delta is a product of narrow factors, all of its singular values are those of a small matrix: with `left = Q R`
and `right' = P S`, they are the ones of `R S'`. Only a change without such factors is formed as a matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from surgery.compiler.algebra.affine import NotAffine, effective
from surgery.compiler.algebra.base import logical, stored_like
from surgery.compiler.algebra.change import NotNarrow
from surgery.compiler.algebra.instance import bias_name, evaluator_of, instance
from surgery.compiler.plan import Plan, Site, WholeParameter
from surgery.compiler.quantize import as_dense
from surgery.runtime.correct import corrected, corrected_sites
from surgery.runtime.export import factors_of

DENSE = 1024  # the shorter side of a matrix whose singular values are all computed; those of a longer one take minutes
PROBES, ROUNDS = 8, 20  # vectors and rounds of the iteration that finds the largest singular value of such a matrix


@dataclass(frozen=True)
class Change:
    """What a run did to one weight; None is what is not known, and `note` says why. Experts of a stack count as one.

    `norm` is Frobenius', `relative` its share of the model's own weight's; `effective_rank` is exp of the entropy of
    the singular values, the mean over experts; `largest` is the largest singular value.
    """

    path: str
    kind: str  # the path below its block
    stack: str  # the path of the list that its block is in
    layer: int | None  # the block's number in that list
    rule: int | None  # None for a parameter that is trained as it is
    shape: tuple[int, ...]
    norm: float | None = None
    relative: float | None = None
    effective_rank: float | None = None
    largest: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Reached:
    """A run's tensors over those of its model, as what computes effective weights reads them."""

    plan: Plan
    model: nn.Module
    weights: Mapping[str, Tensor]
    step: int


@torch.no_grad()
def reached(plan: Plan, model: nn.Module, saved: Mapping[str, Tensor], step: int) -> Reached:
    """A run's `saved` tensors over its model's own, with what happened to W at the start done again.

    The model is as it was loaded: changes are measured against its own weights, also where the run quantized them.
    """
    plan = as_dense(plan)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    weights = {name: tensor.detach() for name, tensor in own.items()} | dict(saved)
    for site in corrected_sites(plan):
        if site.parameter not in saved:
            weights[site.parameter] = corrected(plan, site, weights[site.parameter], weights)
    return Reached(plan, model, weights, step)


@torch.no_grad()
def changes(run: Reached) -> list[Change]:
    """The change of every site, and of every parameter that is trained as it is."""
    sites = [_site_change(run, site) for site in run.plan.sites]
    return sites + [_whole_change(run, whole) for whole in run.plan.trained]


@torch.no_grad()
def changes_alone(plan: Plan, saved: Mapping[str, Tensor], step: int) -> list[Change]:
    """The changes that a run's own tensors tell without the model: of sites whose delta does not read W."""
    needs, plan = "needs the model's own weight", as_dense(plan)
    found = []
    for site in plan.sites:
        place = _place(site.path, site.kind, site.rule, _shape(site))
        if site.facts.moves_base or not site.parameter or instance(plan, site.formula).corrections:
            found.append(replace(place, note=needs))
            continue
        # W is not a number anywhere, and nor is whatever reads it.
        nowhere = torch.full((), torch.nan, dtype=torch.float64)
        weights = {site.parameter: stored_like(nowhere.expand(_shape(site)), site), bias_name(site): nowhere, **saved}
        try:
            factors = factors_of(Reached(plan, nn.Module(), weights, step), site)
            known = factors.scale is None and bool(factors.left.isfinite().all() and factors.right.isfinite().all())
        except (NotNarrow, KeyError):  # of another site's weight
            known = False
        if known:
            found.append(_told(place, spectrum_of_product(factors.left, factors.right), None))
        else:
            found.append(replace(place, note=needs))
    return found + [replace(_place(whole.name, whole.name, None, whole.shape), note=needs) for whole in plan.trained]


def spectrum_of_product(left: Tensor, right: Tensor) -> Tensor:
    """All singular values of `left @ right` that may differ from zero, largest first: `[..., rank]`.

    left `[..., out, rank]`, right `[..., rank, in]`.
    """
    if left.shape[-1] == 0:
        return left.new_zeros(*left.shape[:-2], 1)
    triangles = [torch.linalg.qr(matrix, mode="r").R for matrix in (left, right.transpose(-1, -2))]
    values: Tensor = torch.linalg.svdvals(triangles[0] @ triangles[1].transpose(-1, -2))
    return values


def spectrum(matrix: Tensor) -> Tensor | None:
    """The singular values of a matrix `[..., m, n]`, largest first; None where it is too large for that."""
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1)
    if matrix.count_nonzero() == diagonal.count_nonzero():  # of a norm, or no change at all
        return diagonal.abs().sort(-1, descending=True).values
    return torch.linalg.svdvals(matrix) if min(matrix.shape[-2:]) <= DENSE else None


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of singular values `[..., k]` that are made to sum to one, `[...]`; 0 where all are zero.

    Roy & Vetterli 2007: k equal values give k, one that outweighs all others gives 1.
    """
    total = values.sum(-1, keepdim=True)
    shares = values / torch.where(total > 0, total, 1)
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0)


def delta_of(run: Reached, site: Site) -> tuple[Tensor, Tensor] | Tensor:
    """What a run added to a site's own weight: factors `[..., out, rank]` and `[..., rank, in]`, else `[..., out, in]`.

    Float64. The site has a weight. Raises NotAffine where it has no effective one.
    """
    if site.facts.rank_bound is not None:
        try:
            factors = factors_of(run, site)
        except NotNarrow:
            pass  # it is formed below
        else:
            if factors.scale is None:
                return factors.left, factors.right
    formula = instance(run.plan, site.formula)
    weight = effective(formula, site.bias).weight(formula.shape[0])
    own = logical(run.model.get_parameter(site.parameter).detach(), site).double()
    delta: Tensor = evaluator_of(site, run.weights, torch.float64)(weight) - own
    return delta


def _site_change(run: Reached, site: Site) -> Change:
    place = _place(site.path, site.kind, site.rule, _shape(site))
    if not site.parameter:
        return replace(place, note="it has no weight: its output is adapted")
    size = float(torch.linalg.vector_norm(run.model.get_parameter(site.parameter).detach(), dtype=torch.float64))
    try:
        delta = delta_of(run, site)
    except NotAffine as reason:
        return replace(place, note=f"it has no effective weight: {reason}")
    return (
        _told(place, spectrum_of_product(*delta), size) if isinstance(delta, tuple) else _measured(place, delta, size)
    )


def _whole_change(run: Reached, whole: WholeParameter) -> Change:
    own = run.model.get_parameter(whole.name).detach().double()
    delta = run.weights[whole.name].double() - own
    matrix = delta.reshape(1, -1) if delta.dim() < 2 else delta.flatten(1)
    place = _place(whole.name, whole.name, None, whole.shape)
    return _measured(place, matrix, float(torch.linalg.vector_norm(own)))


def _measured(place: Change, delta: Tensor, size: float) -> Change:
    values = spectrum(delta)
    if values is not None:
        return _told(place, values, size)
    norm = float(torch.linalg.vector_norm(delta))
    note = f"of full rank, and larger than {DENSE}: its effective rank is not computed"
    return replace(place, norm=norm, relative=_share(norm, size), largest=_largest(delta), note=note)


def _told(place: Change, values: Tensor, size: float | None) -> Change:
    """What the singular values `[..., k]` of delta tell; `size` is the norm of the model's own weight."""
    norm = float(torch.linalg.vector_norm(values))
    relative = None if size is None else _share(norm, size)
    rank = float(effective_rank(values).mean())
    return replace(place, norm=norm, relative=relative, effective_rank=rank, largest=float(values.max()))


def _share(norm: float, size: float) -> float | None:
    return norm / size if size else None


def _largest(delta: Tensor) -> float:
    """The largest singular value of `[..., m, n]`, from the space that a few vectors and delta span (block Krylov)."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(delta.shape[-1], PROBES, generator=generator, dtype=delta.dtype)
    blocks = []
    for _ in range(ROUNDS):
        block = torch.linalg.qr(delta.transpose(-1, -2) @ (delta @ block)).Q
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, -1)).Q
    return float(torch.linalg.svdvals(delta @ basis).max())


def _shape(site: Site) -> tuple[int, ...]:
    return site.shape if site.experts is None else (site.experts, *site.shape)


def _place(path: str, kind: str, rule: int | None, shape: tuple[int, ...]) -> Change:
    """Where a weight is. A plan's layers are numbered among those that a rule adapts; these are the model's own."""
    block = re.fullmatch(r"(.+)\.(\d+)", path.removesuffix(f".{kind}")) if path.endswith(f".{kind}") else None
    stack, layer = (block[1], int(block[2])) if block else ("", None)
    return Change(path, kind, stack, layer, rule, shape)
