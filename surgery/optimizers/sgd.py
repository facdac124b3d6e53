"""SGD with momentum for bfloat16 parameters: a float32 buffer, stochastic rounding.

With g the gradient, all in float32:

    g = g + weight_decay * p
    b = momentum * b + g            (b = 0 before the first step)
    p = p - lr * b                  (nesterov: p - lr * (g + momentum * b))

and p is rounded stochastically (`rounding.py`). The operations are those of `torch.optim.SGD` without dampening.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from surgery.compiler.settings import at_least, truth
from surgery.optimizers import optimizer
from surgery.optimizers.rounding import RoundingOptimizer


@optimizer("sgd", lr=at_least(0, above=True), weight_decay=at_least(0), momentum=at_least(0, below=1), nesterov=truth)
class RoundingSGD(RoundingOptimizer):
    """`torch.optim.SGD` with a float32 buffer, which rounds bfloat16 parameters stochastically."""

    def __init__(
        self, parameters: Any, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        self.moments = ("momentum_buffer",) if momentum else ()
        super().__init__(parameters, defaults)

    def update(self, group: dict[str, Any], step: int, value: Tensor, gradient: Tensor, moments: list[Tensor]) -> None:
        """The equations above."""
        if group["weight_decay"]:
            gradient.add_(value, alpha=group["weight_decay"])
        if moments:
            (buffer,) = moments
            buffer.mul_(group["momentum"]).add_(gradient)
            gradient = gradient.add_(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        value.add_(gradient, alpha=-group["lr"])
