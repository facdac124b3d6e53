"""What each of two processes holds during a step in module scope, operation by operation."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing.reductions import StorageWeakRef
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import surgery
from surgery.runtime import module_step

LENGTH = 16  # of the rows: activations are far from having a weight's shape
KEPT = " kept"  # behind a spec's name: the matrices that its methods form are not built again


@dataclass(frozen=True)
class Found:
    """Of one step: the shapes of what is a whole weight when the backward begins, and the bytes at the peak."""

    between: list[tuple[int, ...]]
    peak: int


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The storages that are alive, of what they had first: FSDP2 empties some and fills them again."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, tuple[Any, tuple[int, ...]]] = {}
        self.peak = 0
        for tensor in tensors:
            self._see(tensor)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        self.peak = max(self.peak, sum(size for _, size in self.alive()))
        return result

    def _see(self, tensor: Tensor) -> None:
        here: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = here.untyped_storage()
        if storage._cdata not in self._known or self._known[storage._cdata][0].expired():
            self._known[storage._cdata] = StorageWeakRef(storage), tuple(here.shape)  # type: ignore[no-untyped-call]

    def alive(self) -> list[tuple[tuple[int, ...], int]]:
        """Shapes and bytes."""
        found = []
        for key, (reference, shape) in list(self._known.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._known[key]
            elif storage.nbytes():
                found.append((shape, storage.nbytes()))
        return found


def held(folder: Path, specs: Mapping[str, str], weights: set[tuple[int, int]]) -> dict[str, list[Found]]:
    """What the second step of each spec holds on each of two processes; `weights` are the shapes `[out, in]` sought."""
    multiprocessing.set_forkserver_preload([__name__])
    arguments = (str(folder), dict(specs), sorted(weights))
    start_processes(_work, args=arguments, nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
    found = [json.loads((folder / f"held.{number}.json").read_text()) for number in range(2)]
    return {name: [Found(**process[name]) for process in found] for name in specs}


def _work(number: int, folder: str, specs: dict[str, str], weights: list[tuple[int, int]]) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    own, found = vars(module_step)["built_again"], {}
    for name, text in specs.items():
        vars(module_step)["built_again"] = (lambda plan: ()) if name.endswith(KEPT) else own
        found[name] = asdict(_step(text, Path(folder), {*weights, *((b, a) for a, b in weights)}))
    (Path(folder) / f"held.{number}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def _step(text: str, folder: Path, weights: set[tuple[int, int]]) -> Found:
    step = module_step.module_step(surgery.parse(text, folder), "cpu")
    step.steps = 3
    torch.manual_seed(0)
    ids = torch.randint(0, 100, (2, LENGTH))
    step({"input_ids": ids, "labels": ids})  # makes the optimizer's state
    step.optimizer.zero_grad()
    states = [value for state in step.optimizer.state.values() for value in state.values()]
    mode = Held([*step.model.parameters(), *step.model.buffers(), *step.weights.values(), *states])
    between: list[tuple[int, ...]] = []
    smallest, run = min(map(math.prod, weights)), torch.autograd.backward

    def backward(*arguments: Any, **options: Any) -> None:
        for shape, size in mode.alive():
            gathered = len(shape) == 1 and size >= 4 * smallest  # FSDP2's buffers
            between.extend([shape] if shape in weights or gathered else [])
        run(*arguments, **options)

    torch.autograd.backward = backward
    try:
        with mode:
            step({"input_ids": ids, "labels": ids})
    finally:
        torch.autograd.backward = run
    return Found(between, mode.peak)
