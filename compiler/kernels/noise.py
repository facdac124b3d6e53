"""Random numbers that are a function of (key, step, position): drawn again wherever they are read, never stored.

The numbers come from counters, not from a generator: a forward and its backward, a resumed run and an unbroken one read
the same ones, torch's own generators are left alone, and `step` may be a tensor that a compiled step takes as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def gaussian(like: Tensor, key: Tensor, step: Tensor | int, sizes: Sequence[int], wanted: bool = True) -> Tensor:
    """Standard normal numbers `[*key.shape, *sizes]` in the dtype of `like`; zeros unless they are `wanted`.

    `key` is int64, `[]` or of one number for each expert. By the transform of Box and Muller.
    """
    if not wanted:
        return like.new_zeros(()).expand(*key.shape, *sizes)
    first, second = (_uniform(like, key, step, sizes, stream) for stream in (1, 2))
    return torch.sqrt(-2 * torch.log(first)) * torch.cos(2 * math.pi * second)


def bernoulli(
    like: Tensor, key: Tensor, step: Tensor | int, share: float, sizes: Sequence[int], wanted: bool = True
) -> Tensor:
    """Ones with probability `share`, else zeros; everything else as `gaussian`."""
    if not wanted:
        return like.new_zeros(()).expand(*key.shape, *sizes)
    return (_uniform(like, key, step, sizes, 0) < share).to(like.dtype)


def _uniform(like: Tensor, key: Tensor, step: Tensor | int, sizes: Sequence[int], stream: int) -> Tensor:
    """Numbers above 0 and up to 1."""
    count = math.prod(sizes)
    if count > _MASK:
        raise ValueError(f"noise of {count:,} numbers is more than its counter has")
    number = step.to(torch.int64) if isinstance(step, Tensor) else torch.full((), int(step), device=key.device)
    low, high = key & _MASK, (key >> 32) & _MASK
    begin = _mixed((_mixed((low + number) & _MASK) + high + stream * 0x9E3779B9) & _MASK)
    position = torch.arange(count, dtype=torch.int64, device=key.device)
    bits = _mixed((_mixed(position ^ begin.unsqueeze(-1)) + number + begin.unsqueeze(-1)) & _MASK)
    return ((bits.to(like.dtype) + 0.5) / 2**32).clamp(max=1.0).reshape(*key.shape, *sizes)


def _mixed(value: Tensor) -> Tensor:
    """32 bits in an int64, each of which turns about half of the others over (Wellons' `lowbias32`)."""
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _MASK
    return value ^ (value >> 16)
