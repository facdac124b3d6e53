"""Which form of an operation runs, a kernel in Triton or torch's own products, and what the operations here share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # torch for a CPU comes without it; a constant to torch.compile

HALF = (torch.bfloat16, torch.float16)
"""The floating dtypes of two bytes: fast kernels take them, and what is rounded to them is compared loosely."""

_FLOATS = (torch.float32, *HALF)


def in_triton(*tensors: Tensor) -> bool:
    """Whether a kernel in Triton runs on these: they are on a CUDA device and fit into float32."""
    return HAS_TRITON and all(tensor.is_cuda and tensor.dtype in _FLOATS for tensor in tensors)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Inside, a tensor's CUDA device is the current one, where Triton launches."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()  # type: ignore[no-untyped-call]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are made: float32, or the given one if it is wider."""
    return torch.promote_types(dtype, torch.float32)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast runs a product with x; None where it does not change it.

    An operation of one's own is not autocast by itself.
    """
    return torch.get_autocast_dtype(x.device.type) if _is_autocast(x) and x.dtype != torch.float64 else None


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, operations on x's device keep their dtypes: autocast reaches into an operation of one's own."""
    return torch.autocast(x.device.type, enabled=False) if _is_autocast(x) else nullcontext()


def _is_autocast(x: Tensor) -> bool:
    device = x.device.type  # costs are counted on meta, which has no autocast
    return device != "meta" and torch.is_autocast_enabled(device)


def needs_definition(*frozen: Tensor) -> bool:
    """Whether an operation has to run as it is defined, in plain torch, for its gradients to be all there.

    That is so where what it takes for frozen requires a gradient all the same, and under transforms of torch.func.
    """
    thawed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in frozen)
    return thawed or torch._C._are_functorch_transforms_active()


def ceil_div(length: int, block: int) -> int:
    """How many blocks a length takes."""
    return -(-length // block)


def by_row(matrix: Tensor) -> bool:
    """Whether a matrix is stored row by row (otherwise column by column: the transposed view of such a one)."""
    return matrix.stride(1) == 1


@cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a device."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
