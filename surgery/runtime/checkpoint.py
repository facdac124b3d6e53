"""One weight of another checkpoint, read from its safetensors alone: no model is built."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from surgery.compiler.diagnostics import SurgError, did_you_mean, fail
from surgery.compiler.plan import ModelPlan
from surgery.compiler.span import Span
from surgery.runtime.model_files import find_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_of(name: str, path: str, shape: tuple[int, ...], folder: Path, span: Span | None) -> Tensor:
    """The parameter `path` of the checkpoint `name` as it is stored there, on the CPU.

    `name` is a hub id, `package:NAME/folder` or a folder relative to `folder`, the spec's. The path may lack the prefix
    of the base model, or have one more. Raises SURG037, at `span`, where there is no such weight or it has not `shape`,
    and SURG030 for a checkpoint that does not exist.
    """
    model = ModelPlan(source="hub", name=name)
    try:
        key, file = _find(model, path, folder, span)
        with safe_open(file, "pt") as reader:
            stored = tuple(reader.get_slice(key).get_shape())
            if stored != shape:
                message = f'`{key}` of "{name}" has shape {list(stored)}, the model has {list(shape)}'
                raise fail("SURG037", message, span, help="it must be a checkpoint of the same base model")
            found: Tensor = reader.get_tensor(key)
    except SurgError as error:
        raise SurgError([replace(item, span=item.span or span) for item in error.diagnostics]) from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail("SURG037", f'the checkpoint "{name}" cannot be read: {error}', span) from error
    return found


def _find(model: ModelPlan, path: str, folder: Path, span: Span | None) -> tuple[str, Path]:
    """The name that a parameter has in the checkpoint, and the file that holds it."""
    file = find_file(model, folder, SINGLE)
    if file is not None:
        with safe_open(file, "pt") as reader:
            key = _key(model, path, list(reader.keys()), span)
        return key, file
    index = find_file(model, folder, INDEX)
    if index is None:
        message = f'the checkpoint "{model.name}" has no {SINGLE} that can be read here'
        raise fail("SURG037", message, span, help="save it as safetensors, or name the folder that holds it")
    files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    key = _key(model, path, files, span)
    holder = find_file(model, folder, files[key])
    if holder is None:
        raise fail("SURG037", f'the checkpoint "{model.name}" lacks its file {files[key]}', span)
    return key, holder


def _key(model: ModelPlan, path: str, keys: Iterable[str], span: Span | None) -> str:
    """The key of a path: itself, without its first component, or with one more in front (`bert.`), if only one fits."""
    known = list(keys)
    longer = [key for key in known if key.partition(".")[2] == path]
    for found in (path, path.partition(".")[2], longer[0] if len(longer) == 1 else ""):
        if found in known:
            return found
    message = f'the checkpoint "{model.name}" has no weight `{path}`'
    help_text = did_you_mean(path, known) or "it must be a checkpoint of the same base model"
    raise fail("SURG037", message, span, help=help_text)
