"""An adapter of peft as it lies in a folder: its config and its tensors, by module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from surgery.compiler.diagnostics import SurgError, fail
from surgery.peft.names import CONFIG, PREFIX, TENSORS


@dataclass(frozen=True)
class Folder:
    """The two files of an adapter; `tensors` is None where there is a config alone."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor] | None

    @property
    def type(self) -> str:
        """What peft calls the method."""
        return str(self.config.get("peft_type"))


def read_folder(path: Path) -> Folder:
    """Read an adapter from its folder, or from its config beside which the tensors lie. Raises SURG065."""
    folder = path if path.is_dir() else path.parent
    place = folder / CONFIG if path.is_dir() else path
    try:
        config = json.loads(place.read_bytes())
    except FileNotFoundError as error:
        raise broken(place, "there is no such file") from error
    except (OSError, ValueError) as error:
        raise broken(place, f"it cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise broken(place, "it names no `peft_type`")
    stored = folder / TENSORS
    if not stored.exists():
        pickled = folder / "adapter_model.bin"
        if pickled.exists():
            raise broken(pickled, "it is a pickle, which may run code when it is read",
                         help="load it with peft and save it again: peft writes safetensors")  # fmt: skip
        return Folder(folder, config, None)
    try:
        tensors = load(stored.read_bytes())
        return Folder(folder, config, {name: tensors[name] for name in sorted(tensors)})  # files have any order
    except (OSError, SafetensorError) as error:
        raise broken(stored, f"it cannot be read: {error}") from error


def broken(path: Path, reason: str, help: str | None = None) -> SurgError:
    """SURG065 for a file."""
    return fail("SURG065", f"`{path}` cannot be imported: {reason}", help=help)


def by_module(tensors: Mapping[str, Tensor], mark: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The method's tensors by module and by what peft calls them there, and all others by their full names.

    `mark` begins the names of the method's own: "lora_".
    """
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        path, found, part = name.partition(f".{mark}")
        if found and key.startswith(PREFIX):
            layers.setdefault(path, {})[f"{mark}{part}"] = tensor
        else:
            others[name if key.startswith(PREFIX) else key] = tensor
    return layers, others
