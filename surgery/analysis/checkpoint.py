"""The weights of a model as they lie in its safetensors, read one at a time; the model is never held whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from surgery.compiler.diagnostics import SurgError, fail
from surgery.compiler.plan import ModelPlan
from surgery.compiler.skeleton import Skeleton
from surgery.compiler.weights import Layout
from surgery.runtime.checkpoint import INDEX, SINGLE
from surgery.runtime.model_files import find_file, place_of
from surgery.runtime.models import CLASSES, load_skeleton

HERE = Path()  # paths on the command line count from here
LABELLED = ("sequence_classification", "token_classification", "image_classification")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file under a key; `dtype` is safetensors' name of it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model by their names in it; those that it has in another form, by their keys in the files.

    `skeleton` is the model without numbers, which says what is tied and which axis is which; None where neither the
    checkpoint tells its class nor that which it is compared with. `model` says how it is loaded, as far as it is known.
    """

    model: ModelPlan
    stored: Mapping[str, Stored]
    skeleton: Skeleton | None = None

    @property
    def name(self) -> str:
        """As the user calls it."""
        return self.model.name

    @cached_property
    def names(self) -> dict[str, str]:
        """By every name of a weight, tied ones among them, that under which it is stored."""
        found = {name: name for name in self.stored}
        tied = self.skeleton.owners.values() if self.skeleton and self.model.task else ()
        for names in tied:
            held = [name for name in names if name in self.stored]
            found |= dict.fromkeys(names, held[0]) if held else {}
        return found

    def parameter(self, name: str) -> str | None:
        """The name of a parameter of the model, which may lack the prefix of the base model; None if there is none."""
        real = self.skeleton and self.skeleton.aliases.get(name)
        return real if real and self.skeleton and real in self.skeleton.parameters else None

    def layout(self, name: str) -> Layout | str | None:
        """How a tensor holds a matrix, why it does not, or None where nobody knows."""
        real = self.parameter(name)
        found = self.skeleton.weight(real) if real and self.skeleton else None
        return found.layout if found is not None and not isinstance(found, str) else found

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor that is a matrix, as it is stored."""
        return DTYPES[self.stored[name].dtype]

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored. Raises SURG030 where its file is broken."""
        stored = self.stored[name]
        try:
            with safe_open(stored.file, "pt") as reader:
                found: Tensor = reader.get_tensor(stored.key)
        except (SafetensorError, OSError) as error:
            raise unreadable(self.name, f"{stored.file.name}: {error}") from error
        return found


def why_no_matrix(stored: Stored, layout: Layout | str | None) -> str | None:
    """Why a tensor has no rank that could be told; None where it is a matrix, or a stack of matrices of experts."""
    if stored.dtype not in DTYPES:
        return f"it is stored as {stored.dtype}, in codes or whole numbers"
    if len(stored.shape) < 2 or 0 in stored.shape:
        return "it is a vector" if stored.shape else "it is a number"
    if isinstance(layout, str):
        return layout
    if layout is None and len(stored.shape) not in (2, 4):
        return f"of its {len(stored.shape)} axes nothing says which are outputs and which inputs"
    return None


def matrix_shape(stored: Stored, layout: Layout | str | None) -> tuple[int, ...]:
    """`[..., out, in]` of a tensor that is a matrix."""
    if not isinstance(layout, Layout):
        return stored.shape[0], math.prod(stored.shape[1:])
    return (*(() if layout.experts is None else (layout.experts,)), layout.outputs, layout.inputs)


def as_matrix(tensor: Tensor, layout: Layout | str | None) -> Tensor:
    """W `[..., out, in]` in float64 of a tensor as it is stored."""
    found = tensor.double()
    if not isinstance(layout, Layout) or layout.module_class == "Conv2d":
        return found.flatten(1)
    return found.mT if layout.transposed else found


def unreadable(name: str, reason: str, help: str | None = None) -> SurgError:
    """SURG030 for a checkpoint."""
    return fail("SURG030", f'the model "{name}" cannot be compared: {reason}', help=help)


def open_checkpoint(name: str, task: str | None = None, like: Checkpoint | None = None) -> Checkpoint:
    """A model's checkpoint: a folder, a hub id, `package:NAME/folder`, or one .safetensors file.

    Its files' heads and its config are read. `task` stands for what the config does not say; files without a config are
    taken for a model `like` another one. Raises SURG030.
    """
    model = ModelPlan(source="hub", name=name)
    path = Path(name).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        stored = _heads(name, {path})
    else:
        stored = _heads(name, _files(model))
        model = _named(model, task)
    skeleton = like.skeleton if like is not None and model.task is None else None
    if model.task is not None:
        try:
            skeleton = Skeleton(load_skeleton(model, HERE))
        except SurgError:
            if task is not None:  # it was asked for
                raise
            model = model.model_copy(update={"task": None})
    return Checkpoint(model, stored if skeleton is None else _in_model(stored, skeleton), skeleton)


def _in_model(stored: Mapping[str, Stored], skeleton: Skeleton) -> dict[str, Stored]:
    """Tensors by the names that they get as transformers loads them; what it joins or cuts keeps its key."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model: Any = skeleton.model
    conversions = get_model_conversion_mapping(model)
    renamings = [found for found in conversions if isinstance(found, WeightRenaming)]
    converters = [found for found in conversions if isinstance(found, WeightConverter)]
    found: dict[str, Stored] = {}
    for key, tensor in stored.items():
        name, converted = rename_source_key(key, renamings, converters)
        found[key if converted is not None or name not in skeleton.aliases else name] = tensor
    return found


def _files(model: ModelPlan) -> set[Path]:
    if single := find_file(model, HERE, SINGLE):
        return {single}
    index = find_file(model, HERE, INDEX)
    if index is None:
        help = "save it as safetensors (`save_pretrained`), or name the folder or the file that holds it"
        here = Path(place_of(model, HERE)).is_dir()
        reason = f"there is no {SINGLE} in it" if here else f"no folder here, and no model of the hub with a {SINGLE}"
        raise unreadable(model.name, reason, help)
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(model.name, f"{INDEX} is broken: {type(error).__name__}: {error}") from error
    found = {name: find_file(model, HERE, name) for name in names}
    if lacking := [name for name, path in found.items() if path is None]:
        raise unreadable(model.name, f"its file {lacking[0]} is not there")
    return {path for path in found.values() if path is not None}


def _heads(name: str, files: set[Path]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in sorted(files):
        try:
            with safe_open(file, "pt") as reader:
                for key in reader.keys():  # noqa: SIM118 (it is no dictionary)
                    part = reader.get_slice(key)
                    found[key] = Stored(file, key, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise unreadable(name, f"{file.name}: {error}") from error
    return found


def _named(model: ModelPlan, task: str | None) -> ModelPlan:
    """With the task whose class the config names, and its labels."""
    import transformers

    path = find_file(model, HERE, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError) as error:
        raise unreadable(model.name, f"config.json: {error}") from error
    classes = set(config.get("architectures") or [])
    for known, auto in CLASSES.items() if task is None else ():
        mapping = getattr(transformers, auto)._model_mapping._model_mapping.get(config.get("model_type"), ())
        if classes & set(mapping if isinstance(mapping, tuple) else (mapping,)):
            task = known
            break
    labels = len(config["id2label"]) if task in LABELLED and isinstance(config.get("id2label"), dict) else None
    return model.model_copy(update={"task": task, "labels": labels})
