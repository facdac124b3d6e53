"""Optimizers whose state and arithmetic are float32, and whose bfloat16 parameters are rounded stochastically.

bfloat16 has eight digits. An update below half a unit of the last place is lost by rounding to nearest, at every step
again, and training stalls: with parameters near 1 at a learning rate near 1e-3. Rounded stochastically, up with the
probability that is the cut-off part of a unit, a parameter is right in expectation (Gupta et al. 2015,
arXiv:1502.02551; for bfloat16 weights without a float32 copy: Zamirai et al. 2020, arXiv:2010.06192).

The random bits come from torch's own generator of the parameters' device, which a run seeds, saves and restores. The
tensors of one group are one vector, a slice at a time: few operations, and nothing that the host waits for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SLICE = 1 << 24  # numbers that are in float32 at a time: what a step needs beside the state


def round_stochastically(value: Tensor) -> Tensor:
    """float32 to bfloat16, up or down at random, so that the mean of many is the value; NaN and infinity stay.

    A number is its upper 16 bits and a remainder of 16 bits: a random one is added, and what is left of the lower half
    is cut off.
    """
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device)
    rounded = noise.add_(value.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(value.isnan(), value, rounded).bfloat16()  # the bits of a NaN could carry into another number


@dataclass
class _Part:
    """A slice of a vector: where it is, and the flat pieces of the parameters that it is made of, by their numbers."""

    place: slice
    pieces: list[tuple[int, slice]]
    values: list[Tensor]


@dataclass
class _Vector:
    """Parameters of one dtype that have taken the same number of steps."""

    parameters: list[Tensor]
    moments: list[Tensor]  # [numbers] each
    parts: list[_Part]
    steps: int


class RoundingOptimizer(torch.optim.Optimizer):
    """What the optimizers here share; a subclass says what its state is called and what a step does to vectors."""

    moments: tuple[str, ...] = ()

    def __init__(self, parameters: Any, defaults: dict[str, Any]) -> None:
        super().__init__(parameters, defaults)
        self._vectors: dict[int, tuple[list[Any], list[_Vector]]] = {}  # by group: who has gradients, and as vectors

    @abstractmethod
    def update(self, group: dict[str, Any], step: int, value: Tensor, gradient: Tensor, moments: list[Tensor]) -> None:
        """Change `value` and `moments` in place, all `[numbers]`; `step` counts from 1."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for vector in self._of_group(number, group):
                vector.steps += 1
                gradients = [_flat(parameter.grad, parameter) for parameter in vector.parameters]  # type: ignore[arg-type]
                for part in vector.parts:
                    dtype = torch.promote_types(part.values[0].dtype, torch.float32)
                    value = torch.cat(part.values).to(dtype)
                    gradient = torch.cat([gradients[of][place] for of, place in part.pieces]).to(dtype)
                    self.update(group, vector.steps, value, gradient, [moment[part.place] for moment in vector.moments])
                    stored = round_stochastically(value) if part.values[0].dtype == torch.bfloat16 else value
                    torch._foreach_copy_(
                        part.values, list(torch.split(stored, [piece.numel() for piece in part.values]))
                    )
                for parameter in vector.parameters:
                    self.state[parameter]["step"] = vector.steps
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a state in place; torch's own would round it to the dtype of the parameters."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, parameters, strict=True):
            if known := state_dict["state"].get(number):
                exact = {name: known[name].to(parameter.device, copy=True) for name in self.moments}
                self.state[parameter] = {"step": int(known["step"]), **exact}
        self._vectors.clear()

    def forget(self, tensors: Iterable[Tensor] = ()) -> None:
        """Begin anew with some parameters, and read the state of the others again: somebody may have taken it away."""
        for tensor in tensors:
            self.state.pop(tensor, None)
        self._vectors.clear()

    def _of_group(self, number: int, group: dict[str, Any]) -> list[_Vector]:
        """The vectors of a group; made anew where other parameters than before have gradients, or other memory."""
        present = [parameter for parameter in group["params"] if parameter.grad is not None]
        places = [(id(parameter), parameter.untyped_storage()._cdata) for parameter in present]
        known, vectors = self._vectors.get(number, ([], []))
        if known != places:
            alike: dict[tuple[object, ...], list[Tensor]] = {}
            for parameter in present:
                steps = self.state[parameter].get("step", 0)
                alike.setdefault((parameter.dtype, parameter.device, steps), []).append(parameter)
            vectors = [self._vector(parameters, key[2]) for key, parameters in alike.items()]  # type: ignore[arg-type]
            self._vectors[number] = (places, vectors)
        return vectors

    def _vector(self, parameters: list[Tensor], steps: int) -> _Vector:
        """Parameters as one vector; their state becomes part of it, and keeps what it was."""
        first, sizes = parameters[0], [parameter.numel() for parameter in parameters]
        dtype = torch.promote_types(first.dtype, torch.float32)
        vectors = [torch.zeros(sum(sizes), dtype=dtype, device=first.device) for _ in self.moments]
        for name, vector in zip(self.moments, vectors, strict=True):
            for parameter, piece in zip(parameters, torch.split(vector, sizes), strict=True):
                state = self.state[parameter]
                if name in state:
                    piece.copy_(_flat(state[name], parameter))
                state[name] = _shaped(piece, parameter)
        return _Vector(parameters, vectors, _parts(parameters, sizes), steps)


def _parts(parameters: Sequence[Tensor], sizes: Sequence[int]) -> list[_Part]:
    """The slices of a vector of all the parameters."""
    parts: list[_Part] = []
    begin = 0
    for start in range(0, sum(sizes), SLICE):
        parts.append(_Part(slice(start, min(start + SLICE, sum(sizes))), [], []))
    for number, (parameter, size) in enumerate(zip(parameters, sizes, strict=True)):
        flat = _flat(parameter, parameter)
        for part in parts[begin // SLICE : (begin + size - 1) // SLICE + 1] if size else ():
            inside = slice(max(part.place.start - begin, 0), min(part.place.stop - begin, size))
            part.pieces.append((number, inside))
            part.values.append(flat[inside])
        begin += size
    return parts


def _order(like: Tensor) -> list[int]:
    """Axes as they lie in memory, the one with the longest steps first."""
    return sorted(range(like.dim()), key=like.stride, reverse=True)


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor as a vector in the order in which `like` lies in memory; of `like` itself a view."""
    if like.is_contiguous():
        return tensor.detach().reshape(-1)
    permuted = tensor.detach().permute(_order(like))
    return permuted.view(-1) if tensor is like else permuted.reshape(-1)


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse: a view of a vector in the shape of `like`."""
    order = _order(like)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([like.shape[axis] for axis in order]).permute(inverse)
