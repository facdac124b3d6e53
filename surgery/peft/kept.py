"""What a run changed beside its sites: whole modules for peft's `modules_to_save`, and biases of adapted modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from surgery.compiler.diagnostics import Diagnostics
from surgery.peft.names import is_reserved, is_saved
from surgery.peft.targets import HELP
from surgery.runtime.export import Exportable


@dataclass(frozen=True)
class Kept:
    """`modules` for the config, and tensors by their names in the model: those of all modules that peft wraps."""

    modules: list[str]
    tensors: dict[str, Tensor]
    biases: dict[str, Tensor]


def kept(found: Diagnostics, step: Exportable, targets: Sequence[str], heads: Sequence[str]) -> Kept:
    """All that differs from the model and is no site's weight; `targets` are adapted, `heads` peft keeps by itself.

    Records SURG064 for what no whole module holds, and where peft would take a module for both.
    """
    model = step.model
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    now = _changed(step, tensors)
    biases = {name: now.pop(name) for name in list(now) if name.removesuffix(".bias") in targets}
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in now))
    if "" in owners:
        alone = ", ".join(f"`{name}`" for name in now if "." not in name)
        found.error("SURG064", f"{alone} is trained and belongs to no module that peft could keep", help=HELP)
        owners.remove("")
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    owners = [path for path in owners if not _inside(path, [*owners, *(one for one in paths if is_saved(one, heads))])]
    names = [*owners, *heads]
    wrapped = [path for path in paths if is_saved(path, names)]
    for path in wrapped:
        both = [one for one in targets if one == path or _inside(one, [path]) or _inside(path, [one])]
        both += [one for one in targets if one not in both and is_reserved(one, names)]
        if both:
            message = f"`{path}` is kept whole, and `{both[0]}` is adapted: peft does one or the other"
            found.error("SURG064", message, help=HELP)
        elif _inside(path, wrapped):
            message = f"`{path}` is kept whole, and so is what it belongs to"
            found.error("SURG064", message, help=HELP)
    saved = {
        f"{path}.{key}": now.get(f"{path}.{key}", value)
        for path in wrapped
        for key, value in model.get_submodule(path).state_dict().items()
    }
    return Kept(owners, saved, biases)


def _changed(step: Exportable, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name: what is trained whole or differs from the model, under all names that it has; not the sites' weights."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    adapted = {site.parameter for site in step.plan.sites}
    for site in step.plan.sites:
        if site.parameter and not site.untied:
            adapted |= set(names[id(tensors[site.parameter])])
    trained = {parameter.name for parameter in step.plan.trained}
    now: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = step.weights.get(name)
        if value is None or name in adapted:
            continue
        same = value.data_ptr() == tensor.data_ptr() or bool((value.detach().to(tensor.device) == tensor).all())
        if name in trained or not same:
            now |= dict.fromkeys((alias for alias in names[id(tensor)] if alias not in adapted), value.detach())
    return now


def _inside(path: str, others: Sequence[str]) -> bool:
    """Whether a module is below one of the others."""
    return any(path != other and path.startswith(f"{other}.") for other in others)
