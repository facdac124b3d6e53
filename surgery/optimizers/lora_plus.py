"""LoRA+: the left factor learns faster than the right one.

With `M = scale * B @ A` and B = 0 at the start, A and B should move M alike as the layer grows wider; equal rates move
B too little. The rate of B is `ratio` times that of A, and everything else is left to the optimizer around:

    lr(B) = ratio * lr(A),    ratio near 16

A tensor with a rate of its own keeps it. Hayou, Ghosh and Yu 2024, arXiv:2402.12354.
"""

from __future__ import annotations

from collections.abc import Iterable

from surgery.compiler.plan import FactorsPlan
from surgery.compiler.settings import at_least
from surgery.optimizers import BASES, optimizer


@optimizer("lora_plus", around=BASES, needs="pairs", ratio=at_least(1))
def rates(factors: Iterable[FactorsPlan], ratio: float = 16.0) -> dict[str, float]:
    """What multiplies the learning rate of a tensor, by its key."""
    return {pair.tensors[0]: ratio for pair in factors}
