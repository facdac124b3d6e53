"""Counts the bytes that are alive while torch runs, with or without storage behind the tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from surgery.compiler.kernels.quantized_linear import workspace

WEIGHTS, TRAINED, GRADIENTS, OPTIMIZER, OUTPUTS, BACKWARD = (
    "weights", "trained", "gradients", "optimizer", "outputs", "backward",
)  # fmt: skip


# What an operation takes while it runs, from its arguments; of torch's own nothing is seen.
WORKSPACES: dict[Any, Callable[..., int]] = {torch.ops.surgery.quantized_linear.default: workspace}


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that are alive, by what they are for, `now` and at the `peak`.

    `label` is what the next ones are for; what the backward makes is always its own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.label = OUTPUTS
        self.counts = True  # whether what is made now counts
        self._labels: dict[int, str] = {}  # by storage

    @property
    def most(self) -> int:
        """All bytes at the peak."""
        return self.peak.total()

    def add(self, tensor: Tensor, label: str) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._labels:
            return
        self._labels[key] = label
        self.now[label] += storage.nbytes()
        weakref.finalize(storage, self._end, key, storage.nbytes())
        if self.now.total() > self.most:
            self.peak = +self.now

    def _end(self, key: int, size: int) -> None:
        self.now[self._labels.pop(key)] -= size

    def _reach(self, beside: int, label: str) -> None:
        """Count bytes that are alive for this moment alone."""
        if self.now.total() + beside > self.most:
            self.peak = +self.now
            self.peak[label] += beside

    def relabel(self, tensor: Tensor, label: str) -> None:
        """From now on the storage is for something else."""
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        self.now[self._labels[key]] -= size
        self.now[label] += size
        self._labels[key] = label

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """What is made inside is for `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            return 1.0  # "is the loss finite", and how many steps an optimizer has taken
        result = operation(*args, **(kwargs or {}))
        if not self.counts:
            return result
        label = BACKWARD if torch._C._current_graph_task_id() >= 0 else self.label
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf, label)
        if operation in WORKSPACES:
            self._reach(WORKSPACES[operation](*args), label)
        return result


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)
