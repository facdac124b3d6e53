"""Sites of a rule of which some learn at a time: `active = random(n, every = k)`."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor


def chosen(sites: int, count: int, period: int, seed: str) -> set[int]:
    """Which `count` of so many sites learn in a period: a draw of (seed, period) alone, without torch's generators."""
    return set(random.Random(f"{seed} {period}").sample(range(sites), count))


def rest(sites: Sequence[Sequence[Tensor]], count: int, period: int, seed: str) -> None:
    """Take the gradients of all sites but the chosen ones away, so that no optimizer moves their tensors at all."""
    learning = chosen(len(sites), count, period, seed)
    for number, tensors in enumerate(sites):
        for tensor in tensors if number not in learning else ():
            tensor.grad = None
