"""Numbers of a step that methods name: how far noise has come up, how many components may stay. Plain Python."""

from __future__ import annotations

import math


def cosine_up(step: int, steps: int) -> float:
    """From 0 at the first step to 1 after the last along half a cosine (Flat-LoRA, arXiv:2409.14396)."""
    return 0.5 * (1 - math.cos(math.pi * step / steps))


def cubic_budget(step: int, steps: int, rank: float, target: float, warmup: int, cooldown: int) -> float:
    """`rank` until the warmup is over, `target` from the cooldown on, a falling cubic between.

    AdaLoRA, arXiv:2303.10512; the last step that is not of the cooldown still lies on the curve.
    """
    if step <= warmup:
        return rank
    if step > steps - cooldown:
        return target
    left = 1 - (step - warmup) / (steps - cooldown - warmup)
    return (rank - target) * left**3 + target


def late_budget(step: int, steps: int, rank: float, target: float, begin: float, end: float) -> float:
    """`rank` until step `begin`, `target` from step `end` on: a cubic between that falls slowly first.

    Dynamic DoRA, arXiv:2405.17357.
    """
    if step <= begin:
        return rank
    return target if step >= end else rank - (rank - target) * ((step - begin) / (end - begin)) ** 3
