"""A checkpoint's model whose weights stay in its files: mapped into memory, read where they are looked at.

What spreads a model over processes copies a process's own rows of one block after the other, so that no process holds
the model whole, not even while it starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from surgery.compiler.plan import ModelPlan
from surgery.runtime.checkpoint import INDEX, SINGLE
from surgery.runtime.model_files import find_file
from surgery.runtime.models import load_skeleton


def mapped_model(model: ModelPlan, folder: Path) -> nn.Module | None:
    """The model over its mapped checkpoint, in evaluation mode; nothing may write to its parameters.

    None where the files do not hold each parameter under its name, in its shape and dtype, as safetensors: then it has
    to be loaded by transformers, which converts. Raises SURG030 and SURG031 as `load_skeleton` does.
    """
    if model.source != "hub":
        return None
    files = _files(model, folder)
    with parameters_on_meta():
        made = load_skeleton(model, folder, meta=False)
    persistent = made.state_dict().keys() - dict(made.named_parameters(remove_duplicate=False)).keys()
    readers = {file: safe_open(file, "pt") for file in set(files.values())}
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # of one parameter, tied or not
    for module in made.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, name))
    for name, parameter in list(made.named_parameters()):  # each once: a tied one under its first name
        if name not in files or persistent:
            return None
        stored: torch.Tensor = readers[files[name]].get_tensor(name)  # type: ignore[no-untyped-call]
        if stored.shape != parameter.shape or stored.dtype != parameter.dtype:
            return None
        mapped = nn.Parameter(stored, requires_grad=False)
        for owner, last in places[id(parameter)]:
            owner._parameters[last] = mapped
    return made.eval()


def _files(model: ModelPlan, folder: Path) -> dict[str, Path]:
    """The file of each tensor of a checkpoint; of one in another format nothing."""
    try:
        if single := find_file(model, folder, SINGLE):
            with safe_open(single, "pt") as reader:
                return dict.fromkeys(reader.keys(), single)
        if index := find_file(model, folder, INDEX):
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            found = {name: find_file(model, folder, name) for name in set(names.values())}
            return {key: file for key, name in names.items() if (file := found[name]) is not None}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        pass  # transformers says better what is wrong with it
    return {}


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are made inside have parameters without memory, and buffers as they are."""
    own = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        own(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = own  # type: ignore[method-assign]
