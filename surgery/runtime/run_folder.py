"""A run folder: everything that a run is, in safetensors and JSON, replaced as one whole.

    spec.surg               the program, with the methods it uses
    plan.json               the plan
    step.py                 the training step that runs
    adapters.safetensors    every tensor that a step may write, by its full name
    optimizer.safetensors   the other tensors of the state: optimizer, random generators
    training.json           the rest of the state: step, structure, the spec's folder, data and labels
    metrics.jsonl           one row per step
    saves/step-000200/      earlier saves, each a run folder (`save = every(200, keep = 2)`)
    best/                   the state of the best evaluation, a run folder too (`best = accuracy`)

All files of a save are first written beside their final names (`NAME.new`) and synced; then `commit.json` is renamed
into place, which is the moment at which the save exists; then each file is renamed. Whoever finds a `commit.json`
finishes the renames, so a crash at any time leaves the last save or the new one, never a mixture.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from surgery.compiler.diagnostics import SurgError, fail
from surgery.compiler.kernels.over_processes import is_spread, local
from surgery.compiler.plan import Plan
from surgery.runtime import distributed
from surgery.runtime.sharded import pieces
from surgery.runtime.structure import pack, unpack

PLAN, SPEC, STEP = "plan.json", "spec.surg", "step.py"
ADAPTERS, OPTIMIZER, TRAINING = "adapters.safetensors", "optimizer.safetensors", "training.json"
METRICS, COMMIT, SAVES = "metrics.jsonl", "commit.json", "saves"
STATE_FILES = (PLAN, SPEC, STEP, ADAPTERS, OPTIMIZER, TRAINING)
VERSION = 1


class Savable(Protocol):
    """What a run folder needs of a training step."""

    @property
    def plan(self) -> Plan: ...  # noqa: D102

    @property
    def source(self) -> str: ...  # noqa: D102

    @property
    def folder(self) -> Path: ...  # noqa: D102

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102


@dataclass(frozen=True)
class RunState:
    """A run folder as it was read; `state` is for `step.load_state_dict`."""

    plan: Plan
    spec: str
    source: str  # text of step.py
    folder: Path  # the spec's folder, from which the paths in the plan count
    state: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)  # what `surgery train` keeps: labels, data, total steps

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])


def save_step(step: Savable, directory: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write a step's whole state as a run folder; `extra` (JSON) replaces what the folder keeps beside it, if given.

    All processes of a run call it, the first one writes.
    """
    directory = Path(directory)
    state = step.state_dict()
    spread = any(map(is_spread, state["weights"].values()))
    if distributed.number() > 0:
        for _ in pieces(state["weights"]) if spread else ():
            pass  # this process's rows are sent to the first
        return
    directory.mkdir(parents=True, exist_ok=True)
    finish(directory)
    weights = state["weights"]
    tensors: dict[str, Tensor] = {}
    rest = pack({name: value for name, value in state.items() if name != "weights"}, tensors)
    training = {
        "version": VERSION,
        "step": int(state["step"]),
        # Relative, so that a project may be moved as a whole.
        "folder": os.path.relpath(step.folder.resolve(), directory.resolve()),
        "extra": dict(_kept(directory) if extra is None else extra),
        "state": rest,
    }
    replace(
        directory,
        {
            PLAN: step.plan.model_dump_json(indent=2).encode() + b"\n",
            SPEC: step.plan.spec.encode(),
            STEP: step.source.encode(),
            ADAPTERS: pieces(weights) if spread else _bytes(weights),
            OPTIMIZER: _bytes(tensors),
            TRAINING: json.dumps(training, indent=1).encode() + b"\n",
        },
    )


def load_state(directory: str | Path, *, mapped: bool = False) -> RunState:
    """Read a run folder; tensors of `mapped` files are read where they are looked at.

    Raises SURG054 for a folder that is none, is broken, or does not fit its own plan.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise _broken(directory, "it is a file" if directory.is_file() else "there is no such folder")
    names = _pending(directory)
    try:
        plan = Plan.model_validate_json(_read(directory, PLAN, names))
        training = json.loads(_read(directory, TRAINING, names))
        weights = (_mapped if mapped else _tensors)(directory, ADAPTERS, names)
        tensors = _tensors(directory, OPTIMIZER, names)
        if training["version"] != VERSION:
            raise _broken(directory, f"it has version {training['version']}, this surgery reads version {VERSION}")
        state = unpack(training["state"], tensors)
        state["weights"] = weights
        folder = Path(os.path.normpath(directory.resolve() / training["folder"]))
        spec, source = (_read(directory, name, names).decode() for name in (SPEC, STEP))
        if state["step"] != training["step"] or not isinstance(training["extra"], dict):
            raise _broken(directory, f"{TRAINING} contradicts itself")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise _broken(directory, f"{PLAN} is no plan: {where}: {first['msg']}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _broken(directory, f"a file is broken: {type(error).__name__}: {error}") from error
    for site in plan.sites:
        for tensor in site.tensors:
            if tensor.key not in weights or tuple(weights[tensor.key].shape) != tensor.shape:
                raise _broken(directory, f"{ADAPTERS} has no `{tensor.key}` of shape {list(tensor.shape)}")
    return RunState(plan, spec, source, folder, state, training["extra"])


def _mapped(directory: Path, name: str, pending: tuple[str, ...]) -> dict[str, Tensor]:
    path = next((path for path in _candidates(directory, name, pending) if path.exists()), directory / name)
    try:
        with safe_open(path, "pt") as reader:
            return {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 (it is no dictionary)
    except (SafetensorError, OSError) as error:
        raise _broken(directory, f"{name} is broken: {error}") from error


def _tensors(directory: Path, name: str, pending: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        return load_tensors(_read(directory, name, pending))
    except SafetensorError as error:
        raise _broken(directory, f"{name} is broken: {error}") from error


def is_run(directory: str | Path) -> bool:
    """Whether a folder looks like a run folder (it may still be a broken one)."""
    return any((Path(directory) / name).is_file() for name in (PLAN, COMMIT))


def keep_save(directory: Path, step: int, keep: int) -> None:
    """Keep the present save as `saves/step-NNNNNN`, a run folder of its own, and only the last `keep` of them."""
    finish(directory)
    saves = directory / SAVES
    target, temporary, old = saves / f"step-{step:06d}", saves / ".new", saves / ".old"
    for left in (temporary, old):  # by a crash
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in STATE_FILES:
        shutil.copyfile(directory / name, temporary / name)
    # The spec's folder is two levels further away from here.
    training = json.loads((temporary / TRAINING).read_bytes())
    training["folder"] = os.path.join("..", "..", training["folder"])
    (temporary / TRAINING).write_text(json.dumps(training, indent=1) + "\n")
    if (directory / METRICS).exists():
        shutil.copyfile(directory / METRICS, temporary / METRICS)
    if target.exists():
        os.replace(target, old)
        shutil.rmtree(old)
    os.replace(temporary, target)
    for more in sorted(saves.glob("step-*"), key=lambda save: int(save.name.removeprefix("step-")))[:-keep]:
        os.replace(more, old)  # what is there under its name is whole
        shutil.rmtree(old)


def replace(directory: Path, files: Mapping[str, bytes | Iterable[bytes | memoryview]]) -> None:
    """Replace files of a folder as one: after a crash at any time there are all the old ones, or all the new ones."""
    for name, content in files.items():
        _write(directory / f"{name}.new", content)
    _write(directory / f"{COMMIT}.new", json.dumps(sorted(files)).encode())
    _sync(directory)
    os.replace(directory / f"{COMMIT}.new", directory / COMMIT)
    _sync(directory)
    finish(directory)


def finish(directory: Path) -> None:
    """Finish the renames of a save that a crash interrupted."""
    for name in _pending(directory):
        with contextlib.suppress(FileNotFoundError):  # renamed before the crash
            os.replace(directory / f"{name}.new", directory / name)
    _sync(directory)
    (directory / COMMIT).unlink(missing_ok=True)


def _pending(directory: Path) -> tuple[str, ...]:
    """Names of a save that exists but was not renamed to the end."""
    try:
        names = json.loads((directory / COMMIT).read_bytes())
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise _broken(directory, f"{COMMIT} cannot be read: {error}") from error
    if not isinstance(names, list) or not set(names) <= set(STATE_FILES):
        raise _broken(directory, f"{COMMIT} names files that belong to no run")
    return tuple(names)


def _read(directory: Path, name: str, pending: tuple[str, ...]) -> bytes:
    # A reader leaves an interrupted save as it is (the folder may be read only) and reads through to its files.
    for candidate in _candidates(directory, name, pending):
        try:
            return candidate.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _broken(directory, f"{candidate.name} cannot be read: {error.strerror}") from error
    raise _broken(directory, f"there is no {name} in it")


def _candidates(directory: Path, name: str, pending: tuple[str, ...]) -> list[Path]:
    return [directory / f"{name}.new", directory / name] if name in pending else [directory / name]


def _kept(directory: Path) -> dict[str, Any]:
    try:
        extra = json.loads((directory / TRAINING).read_bytes())["extra"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a new folder, or one whose state is being replaced as a whole
    return extra if isinstance(extra, dict) else {}


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # Tied tensors are stored under each of their names: safetensors refuses shared storage.
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        separate[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
        if separate[name].untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            separate[name] = tensor.clone()  # a view of something larger
    return tensor_bytes(separate, metadata={"format": "pt"})


def _write(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    with open(path, "wb") as file:
        for piece in [content] if isinstance(content, bytes) else content:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    # Renames are only durable once the folder itself is; Windows cannot open folders and does not need it.
    with contextlib.suppress(PermissionError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _broken(directory: Path, reason: str) -> SurgError:
    return fail(
        "SURG054",
        f"`{directory}` is not a readable run folder: {reason}",
        help="a run folder is written by `surgery compile -o DIR` and `surgery train -o DIR`",
    )


def all_finite(weights: Mapping[str, Tensor]) -> bool:
    """Whether no number of a state that is here is infinite or NaN: only such a state may replace a good save."""
    return all(bool(torch.isfinite(local(tensor)).all()) for tensor in weights.values() if tensor.is_floating_point())
