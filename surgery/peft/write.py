"""A run as a folder that `PeftModel.from_pretrained` loads: the change of every site as a LoRA, or as a DoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from surgery import builders
from surgery.compiler import nodes
from surgery.compiler.algebra.instance import instance
from surgery.compiler.diagnostics import Diagnostic, Diagnostics, fail
from surgery.compiler.plan import HALF
from surgery.peft.kept import Kept, kept
from surgery.peft.layout import lora_tensors, magnitude_tensor
from surgery.peft.names import CONFIG, HEADS, PREFIX, TASKS, TENSORS, exactly, is_reserved, is_target
from surgery.peft.targets import HELP, ReadFactors, Refused, Target, magnitude, targets_of
from surgery.runtime.export import Exportable, factors_of, padded
from surgery.runtime.folders import whole_folder
from surgery.runtime.model_files import base_name


@dataclass(frozen=True)
class Adapter:
    """What the two files of an adapter hold, and what has to be said of them."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    warnings: tuple[Diagnostic, ...] = ()


def export(
    step: Exportable, folder: Path, target: Path, dtype: torch.dtype = torch.float32, *,
    factors: ReadFactors = factors_of, own_ranks: bool = False,
) -> Adapter:  # fmt: skip
    """Write a run as peft's folder; one that is there is replaced as a whole. `folder` is the spec's.

    `factors` says what to write for a site. With `own_ranks` every module has its own rank in the config
    (`rank_pattern`); else all have the largest.
    Raises SURG064, with all the reasons, where a site is no LoRA, and for a folder that holds other files too.
    """
    check_folder(target)
    made = adapter(step, folder, dtype, factors=factors, own_ranks=own_ranks)
    with whole_folder(target) as fresh:
        (fresh / CONFIG).write_text(json.dumps(made.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (fresh / TENSORS).write_bytes(save(made.tensors, metadata={"format": "pt"}))
    return made


def method_of(rank: int) -> nodes.Call:
    """The library's method that a folder of these holds at a rank."""
    return builders.method("lora", rank=rank, alpha=rank)


def check_folder(target: Path) -> None:
    """Raise SURG064 for a folder that holds other files than an adapter's, which would be lost."""
    others = {path.name for path in target.iterdir()} - {CONFIG, TENSORS} if target.exists() else set()
    if others:
        message = f"`{target}` holds other files, which would be lost: {', '.join(sorted(others)[:5])}"
        raise fail("SURG064", message, help="choose a new folder")


@torch.no_grad()
def adapter(
    step: Exportable, folder: Path, dtype: torch.dtype = torch.float32, *,
    factors: ReadFactors = factors_of, own_ranks: bool = False,
) -> Adapter:  # fmt: skip
    """A run as peft's config and tensors, the factors in `dtype`. Raises SURG064."""
    found, refused = Diagnostics(), Refused(step)
    targets = targets_of(refused, step, factors)
    refused.report(found)
    modules = [target.name for target in targets if target.is_module]
    parameters = [target.name for target in targets if not target.is_module]
    task = TASKS.get(step.plan.model.task or "", "")
    if any(is_reserved(name, HEADS.get(task, ())) for name in modules):
        task = ""  # peft would keep the head whole, and not adapt it
    whole = kept(found, step, [target.name for target in targets], HEADS.get(task, ()))
    transposed = any(target.module_class == "Conv1D" for target in targets)
    _check_parameters(found, step.model, parameters, transposed)
    found.raise_errors()

    rank = max([1, *(target.factors.rank for target in targets)])
    ranks = {target.name: max(1, target.factors.rank) if own_ranks and target.is_module else rank for target in targets}
    # peft takes the first pattern that fits the end of a name: every module has one, the longest stand first
    several = sorted(ranks, key=len, reverse=True) if len(set(ranks.values())) > 1 else []
    pattern = {re.escape(name): ranks[name] for name in several}
    tensors: dict[str, Tensor] = {}
    for target in targets:
        tensors |= _tensors(step, target, ranks[target.name], dtype, parameters)
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise fail("SURG064", f"`{broken[0]}` has numbers that do not fit {dtype}", help="choose another --dtype")
    drops = {instance(step.plan, site.formula).dropout for site in step.plan.sites}
    config = {
        "peft_type": "LORA",
        "task_type": task or None,
        "auto_mapping": None if task else _auto_mapping(step.model),
        "base_model_name_or_path": base_name(step.plan.model, folder),
        "revision": step.plan.model.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": drops.pop() if len(drops) == 1 and not parameters else 0.0,
        "target_modules": exactly(modules, [path for path, _ in step.model.named_modules()]),
        "modules_to_save": whole.modules or None,
        "fan_in_fan_out": transposed,
        "bias": "all" if whole.biases else "none",
        "use_dora": any(target.factors.scale is not None for target in targets),
        "use_rslora": False,
        "init_lora_weights": True,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "layers_to_transform": None,
        "layers_pattern": None,
    } | ({"target_parameters": parameters} if parameters else {})
    return Adapter(config, tensors | _whole(whole), (*_rounded(step, targets), *_tied(step, targets)))


def _tensors(
    step: Exportable, target: Target, rank: int, dtype: torch.dtype, parameters: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors of one target by their names in the file, rounded once."""
    factors, kind = target.factors, target.module_class
    left, right = (side.to(dtype) for side in padded(factors.left, factors.right, rank))
    prefix = f"{PREFIX}{target.name}"
    if not target.is_module:  # of several parameters of one module the last one is wrapped around the others
        owner = target.name.rpartition(".")[0]
        names = [f"{owner}.{name}" for name, _ in step.model.get_submodule(owner).named_parameters(recurse=False)]
        later = [name for name in names[names.index(target.name) + 1 :] if name in parameters]
        prefix = f"{PREFIX}{owner}{'.base_layer' * len(later)}"
    found = lora_tensors(prefix, kind, left, right, target.site.kernel)
    if factors.scale is not None:
        found |= magnitude_tensor(prefix, kind, magnitude(step, target, left, right).to(dtype))
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def _whole(whole: Kept) -> dict[str, Tensor]:
    """The tensors of modules that are kept whole, and biases of adapted ones, which peft moves one level down."""
    biases = {f"{name.removesuffix('.bias')}.base_layer.bias": bias for name, bias in whole.biases.items()}
    return {
        f"{PREFIX}{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in (whole.tensors | biases).items()
    }


def _check_parameters(found: Diagnostics, model: nn.Module, parameters: Sequence[str], transposed: bool) -> None:
    """Record what peft cannot do where it adapts parameters by name."""
    if parameters and transposed:
        message = f"peft adapts no parameters such as `{parameters[0]}` beside modules of the class Conv1D"
        found.error("SURG064", message, help=HELP)
    for name, _ in model.named_parameters():
        if name not in parameters and is_target(name, parameters):
            message = f"peft would take `{name}` for a weight that was adapted: its name ends like one"
            found.error("SURG064", message, help=HELP)


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def _rounded(step: Exportable, targets: Sequence[Target]) -> tuple[Diagnostic, ...]:
    """Say where the run's own W was rounded as it moved, below float32: the exported sum is not."""
    moved = [target for target in targets if target.factors.rounding and target.site.dtype in HALF]
    if not moved:
        return ()
    most = max(target.factors.rounding for target in moved)
    site = moved[0].site
    message = (
        f"the run moved W at {len(moved)} {'site' if len(moved) == 1 else 'sites'} and rounded it to {site.dtype}; the "
        f"adapter holds the sum itself, so their weights differ by up to {most:.1e} of the largest entry"
    )
    help = "`surgery merge RUN -o DIR` writes the weights of the run"
    return (Diagnostic("SURG066", message, step.plan.span(site.place), (), help, "warning"),)


def _tied(step: Exportable, targets: Sequence[Target]) -> tuple[Diagnostic, ...]:
    """Say where peft's own merging would write one memory for two weights."""
    names: dict[int, list[str]] = {}
    for name, tensor in step.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    for target in targets:
        alike = names[id(step.model.get_parameter(target.site.parameter))]
        if len(alike) > 1:
            message = f"`{alike[0]}` and `{alike[1]}` are tied: peft applies this adapter, and cannot merge it"
            help = "use it unmerged, or `surgery merge RUN -o DIR`"
            return (Diagnostic("SURG067", message, step.plan.span(target.site.place), (), help, "warning"),)
    return ()
