"""Merging: a copy of the user's model whose weights are the effective ones, and its standard Hugging Face folder.

A merged weight is computed in float32 (or the model's dtype, if wider) and rounded once, to the dtype it is stored in.
"""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from surgery.compiler.algebra.base import stored_like
from surgery.compiler.diagnostics import Diagnostics, SurgError, fail
from surgery.compiler.plan import Site
from surgery.runtime.adapted import Adapted
from surgery.runtime.quantize import dense_model


class Mergeable(Adapted, Protocol):
    """What merging needs of a training step."""

    def effective_weight(self, path: str) -> Tensor: ...  # noqa: D102

    def effective_bias(self, path: str) -> Tensor | None: ...  # noqa: D102


@torch.no_grad()
def merged(step: Mergeable) -> nn.Module:
    """A copy of the user's model, of the same class, that computes what the adapted model does in evaluation.

    Raises SURG055, with all the reasons, where a site does not merge into its weight; nothing is dropped.
    """
    found = Diagnostics()
    for site in step.plan.sites:
        if not site.facts.merges:
            _refuse(found, step, site, f"`{site.method}` does not merge into a weight{_because(site)}")
    found.raise_errors()
    model = copy.deepcopy(step.model)
    for site in step.plan.sites:
        if site.untied:  # before anything is copied: what this weight became is not what its partner is
            _untie(found, step, model, site)
    names = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in names.items():  # whole trained parameters, weights that events moved, running statistics
        if name in step.weights:
            tensor.copy_(step.weights[name])
    model = dense_model(model)
    for site in step.plan.sites:
        _merge_site(found, step, model, site)
    found.raise_errors()
    return model


def _because(site: Site) -> str:
    return f": {site.facts.merge_reason}" if site.facts.merge_reason else ""


def _merge_site(found: Diagnostics, step: Mergeable, model: nn.Module, site: Site) -> None:
    module = model.get_submodule(site.parameter.rpartition(".")[0])
    weight = model.get_parameter(site.parameter)
    effective = step.effective_weight(site.path)
    stored = stored_like(effective, site)
    if site.module_class == "Norm" and bool((effective - torch.diag_embed(stored)).any()):
        _refuse(found, step, site, f"its effective weight is no diagonal matrix, which a {site.module_class} holds")
        return
    rounded = stored.to(weight.dtype)
    if not torch.isfinite(rounded).all():
        reason = "is not finite" if not torch.isfinite(effective).all() else f"does not fit {weight.dtype}"
        _refuse(found, step, site, f"its effective weight {reason}")
        return
    weight.copy_(rounded)
    bias, own = step.effective_bias(site.path), getattr(module, "bias", None)
    if own is not None and bias is not None:
        own.copy_(bias.to(own.dtype))
    elif bias is not None and bool(bias.any()):
        _refuse(found, step, site, f"it needs a bias, and this {site.module_class} has none")


def _untie(found: Diagnostics, step: Mergeable, model: nn.Module, site: Site) -> None:
    """Give the site of an `untie` rule a weight of its own: only this use of the tied one was adapted."""
    module = model.get_submodule(site.path)
    weight: Tensor = module.get_parameter("weight")
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False
        if getattr(type(config).from_dict(config.to_dict()), "tie_word_embeddings", False):
            _refuse(found, step, site, f"{type(model).__name__} always ties this weight to another")


def _refuse(found: Diagnostics, step: Mergeable, site: Site, reason: str) -> None:
    found.error("SURG055", f"`{site.path}` cannot be merged: {reason}", step.plan.span(site.place))


def save_merged(step: Mergeable, target: str | Path, tokenizer: Any = None, labels: tuple[str, ...] = ()) -> None:
    """Write the merged model as a standard folder that `transformers` loads without surgery, tokenizer included.

    `labels` name the classes in the config. The folder appears as a whole or not at all; one that has files already is
    refused, as is a model that is no `PreTrainedModel` (SURG055).
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise _cannot(f"`{target}` exists already", "choose a new folder")
    model: Any = merged(step)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise _cannot(f"{type(model).__name__} is no transformers model, so it has no standard folder",
                      "step.merge() gives the merged module itself")  # fmt: skip
    if labels and len(labels) == model.config.num_labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: number for number, name in enumerate(labels)}
    temporary = target.with_name(f".{target.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cannot(reason: str, help: str) -> SurgError:
    return fail("SURG055", f"the merged model cannot be written: {reason}", help=help)
