"""What an adapter of peft holds: the modules that it adapts, and parameters that it keeps whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from surgery.peft.kinds import Kind, Layer, Unsupported
from surgery.peft.names import HEADS, is_saved, is_target, meant
from surgery.peft.read import Folder, by_module


@dataclass
class Contents:
    """Of one adapter: its modules, and by name in the model what it keeps whole and what of the model it repeats."""

    layers: list[Layer] = field(default_factory=list)
    whole: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)  # modules and parameters for `train`
    unknown: list[Unsupported] = field(default_factory=list)


def contents_of(given: Folder, kind: Kind, skeleton: nn.Module | None) -> Contents:
    """What the tensors are of, or without them what the config means in a model."""
    if given.tensors is not None:
        return _by_tensors(given.config, given.tensors, kind, skeleton)
    assert skeleton is not None
    return _by_config(given.config, skeleton)


def _by_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: Kind, skeleton: nn.Module | None
) -> Contents:
    found, ties = Contents(), ties_of(skeleton)
    parts, others = by_module(tensors, kind.mark)
    shared = {name: others.pop(name) for name in kind.shared if name in others}
    for path, own in parts.items():
        name = _parameter(path, config, skeleton)
        found.layers.append(Layer(name, config, own, shared, experts_of(skeleton, name)))
    for name, tensor in others.items():
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        owner = _owner(plain, config)
        if owner and ".original_module." not in name:
            found.whole[plain] = tensor
            found.kept.append(owner)
        elif plain.endswith(".bias") and config.get("bias", "none") != "none":  # peft repeats those of kept modules
            if not owner:
                found.whole[plain] = tensor
                found.kept.append(plain)
        elif plain.removesuffix(".weight") in parts:
            found.base[plain] = tensor
        elif _is_repeated(plain.removesuffix(".weight"), config, ties):
            found.whole[plain] = tensor
        else:
            reason = "it is of none of the adapted modules, nor of those in `modules_to_save`"
            found.unknown.append(Unsupported(name, reason))
    first = {ties.get(path, path): path for path in reversed(found.kept)}  # what is tied is trained under one name
    found.kept = [path for path in dict.fromkeys(found.kept) if first[ties.get(path, path)] == path]
    return found


def _is_repeated(path: str, config: Mapping[str, Any], ties: Mapping[str, str]) -> bool:
    """Whether the weight of a module is tied to one that is kept whole."""
    alike = [other for other in ties if path in ties and ties[other] == ties[path]]
    return any(is_saved(other, _kept(config)) for other in alike)


def _by_config(config: Mapping[str, Any], skeleton: nn.Module) -> Contents:
    wanted, parameters = config.get("target_parameters") or [], names_of(skeleton)
    modules = meant(config, skeleton)
    paths = [*modules, *(name.removesuffix(".weight") for name in parameters if is_target(name, wanted))]
    saved = [path for path, _ in skeleton.named_modules() if path and is_saved(path, _kept(config))]
    if (bias := config.get("bias", "none")) != "none":
        saved += [
            name
            for name in parameters
            if name.endswith(".bias") and not _owner(name, config)
            if bias == "all" or name.removesuffix(".bias") in modules
        ]
    return Contents([Layer(path, config, experts=experts_of(skeleton, path)) for path in paths], kept=saved)


def _kept(config: Mapping[str, Any]) -> list[str]:
    return [*(config.get("modules_to_save") or []), *HEADS.get(config.get("task_type") or "", ())]


def _owner(name: str, config: Mapping[str, Any]) -> str:
    """The module of `modules_to_save` that a tensor belongs to, "" if there is none."""
    parts = name.split(".")
    owners = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((path for path in owners if is_saved(path, _kept(config))), "")


def _parameter(path: str, config: Mapping[str, Any], skeleton: nn.Module | None) -> str:
    """The weight meant by a wrapped module of `target_parameters`: the last of several is the outermost."""
    wanted = config.get("target_parameters") or []
    owner, depth = path.replace(".base_layer", ""), path.count(".base_layer")
    if not wanted or skeleton is None:
        return path
    names = [f"{owner}.{name}" for name, _ in skeleton.get_submodule(owner).named_parameters(recurse=False)]
    names = [name for name in names if is_target(name, wanted)]
    return names[len(names) - 1 - depth].removesuffix(".weight") if names else path


def experts_of(skeleton: nn.Module | None, path: str) -> int | None:
    """How many matrices a parameter stacks."""
    named = {} if skeleton is None else dict(skeleton.named_parameters())
    return named[path].shape[0] if path in named and named[path].dim() == 3 else None


def names_of(skeleton: nn.Module) -> list[str]:
    """The names of all parameters, every one of those that are tied."""
    return [name for name, _ in skeleton.named_parameters(remove_duplicate=False)]


def ties_of(skeleton: nn.Module | None) -> dict[str, str]:
    """By module whose weight is another's too: the first of them."""
    owners: dict[int, list[str]] = {}
    for name, tensor in () if skeleton is None else skeleton.named_parameters(remove_duplicate=False):
        owners.setdefault(id(tensor), []).append(name.rpartition(".")[0])
    return {path: paths[0] for paths in owners.values() if len(paths) > 1 for path in paths}
