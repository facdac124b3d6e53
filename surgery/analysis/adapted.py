"""A run of surgery, or an adapter of peft, over the checkpoint that it is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

import surgery
from surgery.analysis.checkpoint import HERE, Checkpoint
from surgery.analysis.checkpoints import factor_of
from surgery.analysis.products import Factor, natural
from surgery.analysis.spectra import Change
from surgery.analysis.weights import LeftOut, Matrix, Pairs, Weight, check_factor, turned
from surgery.compiler.algebra.base import logical
from surgery.compiler.diagnostics import fail
from surgery.compiler.plan import ModelPlan, Plan, Site, WholeParameter
from surgery.compiler.skeleton import Skeleton
from surgery.peft.importing import import_adapter
from surgery.peft.names import CONFIG
from surgery.peft.read import broken
from surgery.runtime.mapped import mapped_model
from surgery.runtime.model_files import base_name
from surgery.runtime.models import load_model
from surgery.runtime.report.changes import Reached, delta_of, reached
from surgery.runtime.run_folder import is_run, load_state


@dataclass(frozen=True)
class Adapted:
    """What a run changed of the base's weights; `note` is what has to be said of the two."""

    run: Reached
    note: str = ""

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The sites that have a weight, by its name in the model."""
        return {site.parameter: site for site in self.run.plan.sites if site.parameter}

    @cached_property
    def whole(self) -> dict[str, WholeParameter]:
        """The parameters that were trained as they are, by name."""
        return {whole.name: whole for whole in self.run.plan.trained}

    def change(self, name: str) -> Change:
        """What was added to a weight, float64: factors, or a matrix. Raises NotAffine where it is no matrix at all."""
        if name in self.sites:
            return delta_of(self.run, self.sites[name])
        added: Tensor = self.run.weights[name].double() - self.run.model.get_parameter(name).detach().double()
        return added

    def own(self, name: str) -> Tensor:
        """The base's W `[..., out, in]`, float64."""
        stored = self.run.model.get_parameter(name).detach()
        return (logical(stored, self.sites[name]) if name in self.sites else stored).double()


def is_adapted(target: Path) -> bool:
    """Whether a target is a run or an adapter, and no model of its own."""
    return is_run(target) or target.name == CONFIG or (target / CONFIG).is_file()


def open_adapted(target: Path, base: Checkpoint, task: str | None = None) -> Adapted:
    """A run or an adapter with the base's weights below it, which stay in their files where these allow it.

    Raises SURG054 and SURG065 for what cannot be read, SURG074 for what was made for another architecture.
    """
    return _run(target, base) if is_run(target) else _adapter(target, base, task)


def _run(target: Path, base: Checkpoint) -> Adapted:
    state = load_state(target, mapped=True)
    model = state.plan.model
    if model.source != "hub":
        message = f"`{target}` is a run of a model made from {'Python' if model.source != 'config' else 'a config'}"
        raise fail("SURG074", f"{message}, which is no checkpoint", help="`surgery report RUN` says how far it went")
    given = model.model_copy(update={"name": base.name, "revision": base.model.revision, "dtype": None})
    loaded = _loaded(given, state.plan, f"`{target}`")
    own, other = base_name(model, state.folder), base_name(given, HERE)
    note = (
        "" if own == other else f'`{target}` was trained from "{model.name}", and is taken as a change of "{base.name}"'
    )
    return Adapted(reached(state.plan, loaded, state.state["weights"], state.step), note)


def _adapter(target: Path, base: Checkpoint, task: str | None) -> Adapted:
    imported = import_adapter(target, HERE, base.name, task)
    if not imported.tensors:
        raise broken(target, "it has no tensors, so it changes nothing")
    plan = surgery.plan(surgery.parse(imported.text, HERE))
    saved = dict(imported.whole)
    for site in plan.sites:
        found = imported.tensors.get(site.path, {})
        for tensor in site.tensors:
            given = found.get(tensor.name)
            if given is None or tuple(given.shape) != tensor.shape:
                has = "lacks it" if given is None else f"has {list(given.shape)}"
                raise broken(target, f"`{site.path}.{tensor.name}` is {list(tensor.shape)} here, and the adapter {has}")
            saved[tensor.key] = given
    return Adapted(reached(plan, _loaded(plan.model, plan, f"`{target}`"), saved, 0))


def _loaded(model: ModelPlan, plan: Plan, what: str) -> nn.Module:
    """The base under a run: mapped from its files, or as transformers loads it."""
    found = mapped_model(model, HERE) or load_model(model, HERE, seed=plan.step.seed)
    if Skeleton(found).fingerprint != plan.model.fingerprint:
        help = "name the model that it was made for, or one of the same shape"
        raise fail("SURG074", f'{what} does not fit "{model.name}": its weights have other names or shapes', help=help)
    return found


class OverBase:
    """A checkpoint, and a run or an adapter over it; a weight has the name that the model gives it."""

    def __init__(self, base: Checkpoint, adapted: Adapted) -> None:
        self.base, self.adapted = base, adapted
        self.base_names = self.target_names = list(base.names)

    @property
    def names(self) -> Iterable[str]:
        """Of all weights that were adapted or trained."""
        return sorted([*self.adapted.sites, *self.adapted.whole], key=natural)

    def fill(self, pairs: Pairs, names: Iterable[str]) -> None:
        """The changes of these weights."""
        if self.adapted.note:
            pairs.found.warn("SURG075", self.adapted.note)
        outputs = [site.path for site in self.adapted.run.plan.sites if not site.parameter]
        pairs.left_out += [LeftOut(path, "it has no weight: its output is adapted", True) for path in outputs]
        norms = {name for name, site in self.adapted.sites.items() if site.module_class == "Norm"}
        vectors = {name for name, whole in self.adapted.whole.items() if len(whole.shape) != 2}
        for name in names:
            if name in norms | vectors:
                pairs.left_out.append(LeftOut(name, "it is no matrix", True))
            else:
                pairs.weights.append(self._weight(name))

    def _weight(self, name: str) -> Weight:
        site = self.adapted.sites.get(name)
        shape = self.adapted.whole[name].shape if site is None else site.shape
        stack = () if site is None or site.experts is None else (site.experts,)
        untied = site is not None and site.untied
        return Weight(
            name, (*stack, *shape), lambda: self.adapted.own(name), lambda: self.adapted.change(name), untied=untied
        )

    def of_base(self, factor: Factor) -> Matrix:
        """A weight of the base in a product."""
        return factor_of(self.base, factor)

    def of_target(self, factor: Factor) -> Matrix:
        """The same weight with what was added to it."""
        name = self.base.parameter(self.base.names[factor.name]) or factor.name
        if name not in (*self.adapted.sites, *self.adapted.whole):
            return replace(self.of_base(factor), rounded=None)
        weight = self._weight(name)
        check_factor(factor, None, len(weight.shape))
        return Matrix(factor, turned(weight.target, factor), None)
