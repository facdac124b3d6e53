"""The gradients of a step as a CUDA graph: one launch in place of thousands, where launching takes longest."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.compiler.diagnostics import Diagnostic, render

Weights = dict[str, Tensor]
Gradients = Callable[..., Tensor]  # (weights, batch, and a GradScaler for float16) -> loss
Signature = tuple[tuple[str, torch.Size, torch.dtype], ...]


@dataclass(frozen=True)
class Recorded:
    """One recorded batch: its graph, the tensors that the graph reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: dict[str, Tensor]
    loss: Tensor
    gradients: tuple[tuple[Tensor, Tensor], ...]  # a trained tensor and its gradient

    def run(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch of the recorded shapes; its gradients are in place."""
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        for trained, gradient in self.gradients:
            trained.grad = gradient
        return self.loss.clone()


def replayed(gradients: Gradients, device: torch.device) -> Gradients:
    """`gradients` of a step.py as a `Replay`; where there are no CUDA graphs as they are, with SURG058."""
    if device.type == "cuda":
        return Replay(gradients, device)
    _warn(f"there are none on the device `{device.type}`")
    return gradients


class Replay:
    """`gradients` of a step.py, recorded per shapes of a batch and then replayed; the numbers are the same to the bit.

    The first batch of some shapes runs as it is, on the stream that recordings are made on: what is made once (compiled
    blocks, workspaces) is made there. The second is recorded; the very first time it is watched first. Where one launch
    cannot stand for the step, everything runs as it is, with SURG058: the host waits for the device in it, it draws
    random numbers on the CPU, or CUDA refuses the recording.
    """

    def __init__(self, gradients: Gradients, device: torch.device, most: int = 32) -> None:
        self.gradients, self.device, self.most = gradients, device, most
        self.recorded: OrderedDict[Signature, Recorded] = OrderedDict()  # the least recently used first
        self.seen: set[Signature] = set()
        self.watched = False
        self.refused = ""  # why nothing is recorded
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()  # one for all: only one graph runs at a time
        self.places: tuple[int, ...] = ()

    def __call__(self, weights: Weights, batch: dict[str, Tensor], *scaler: Any) -> Tensor:
        """The loss; gradients are added to those of `weights`."""
        trained = [tensor for tensor in weights.values() if tensor.requires_grad]
        if self.refused or any(tensor.grad is not None for tensor in trained):
            return self.gradients(weights, batch, *scaler)
        self._forget_if_moved(weights)
        signature = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        if signature in self.recorded:
            self.recorded.move_to_end(signature)
            return self.recorded[signature].run(batch)
        if signature not in self.seen:
            self.seen.add(signature)
            with self._beside():
                return self.gradients(weights, batch, *scaler)
        if not self.watched:
            return self._watch(weights, batch, *scaler)
        if self._record(signature, trained, weights, batch, *scaler):
            return self.recorded[signature].run(batch)
        return self.gradients(weights, batch, *scaler)

    def _watch(self, weights: Weights, batch: dict[str, Tensor], *scaler: Any) -> Tensor:
        """As it is, looking for what a recording could not repeat."""
        self.watched = True
        random = torch.get_rng_state()
        found: list[str] = []
        with self._beside(), _waits(found):
            loss = self.gradients(weights, batch, *scaler)
        if found:
            self._refuse(f"the host waits for the device, in {found[0]}")
        elif not torch.equal(random, torch.get_rng_state()):
            self._refuse("random numbers are drawn on the CPU, and a recording would repeat them")
        return loss

    def _record(
        self, signature: Signature, trained: list[Tensor], weights: Weights, batch: dict[str, Tensor], *scaler: Any
    ) -> bool:
        """Record without running anything; whether CUDA did."""
        static = {name: tensor.clone() for name, tensor in batch.items()}
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.stream.device.index]
        random = generator.clone_state()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                loss = self.gradients(weights, static, *scaler)
        except Exception as error:  # whatever it was, the step as it is runs into it too, or need not
            generator.graphsafe_set_state(random)  # the present one may still count for the recording
            for tensor in trained:
                tensor.grad = None
            self._refuse(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            return False
        gradients = tuple((tensor, tensor.grad) for tensor in trained if tensor.grad is not None)
        self.recorded[signature] = Recorded(graph, static, loss, gradients)
        if len(self.recorded) > self.most:
            self.recorded.popitem(last=False)
        return True

    def _forget_if_moved(self, weights: Weights) -> None:
        """A recording holds addresses: it is void once a weight lies elsewhere."""
        places = tuple(tensor.data_ptr() for tensor in weights.values())
        if places != self.places:
            self.places = places
            self.recorded.clear()

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        self.recorded.clear()
        _warn(reason)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of the recordings, in order with what the present one does before and after."""
        present = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(present)
        with torch.cuda.stream(self.stream):
            yield
        present.wait_stream(self.stream)


@contextmanager
def _waits(found: list[str]) -> Iterator[None]:
    """Collects where the host waits for the device meanwhile."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
        elif "Synchronization debug mode" not in str(warning.message):  # said of the mode itself
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _warn(reason: str) -> None:
    message = f"the gradients of a step are not replayed as one CUDA graph: {reason}"
    warnings.warn(render(Diagnostic("SURG058", message, severity="warning")), stacklevel=2)
