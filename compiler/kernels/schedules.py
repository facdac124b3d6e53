"""Numbers of a step that methods name: how far noise has come up, how many components may stay. Plain Python."""

from __future__ import annotations

import math


def cosine_up(step: int, steps: int) -> float:
    """From 0 at the first step to 1 after the last along half a cosine (Flat-LoRA, arXiv:2409.14396, section 3.3)."""
    return 0.5 * (1 - math.cos(math.pi * step / steps))


def cubic_budget(step: int, steps: int, rank: float, target: float, warmup: int, cooldown: int) -> float:
    """`rank` until the warmup is over, `target` from the cooldown on, a falling cubic between.

    AdaLoRA, arXiv:2303.10512, eq. 12; the last step that is not of the cooldown still lies on the curve.
    """
    if step <= warmup:
        return rank
    if step > steps - cooldown:
        return target
    left = 1 - (step - warmup) / (steps - cooldown - warmup)
    return (rank - target) * left**3 + target
