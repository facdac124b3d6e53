"""AdamW for bfloat16 parameters: float32 moments, stochastic rounding.

With g the gradient, t the number of the step from 1, all in float32:

    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g^2
    p = p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

and p is rounded stochastically (`rounding.py`). Loshchilov and Hutter 2019, arXiv:1711.05101; the operations are those
of `torch.optim.AdamW`, in its order, so that a float32 parameter gets the same numbers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from surgery.compiler.settings import at_least, pair
from surgery.optimizers import optimizer
from surgery.optimizers.rounding import RoundingOptimizer


@optimizer("adamw", lr=at_least(0, above=True), weight_decay=at_least(0), betas=pair, eps=at_least(0, above=True))
class RoundingAdamW(RoundingOptimizer):
    """`torch.optim.AdamW` with float32 moments, which rounds bfloat16 parameters stochastically."""

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, parameters: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], step: int, value: Tensor, gradient: Tensor, moments: list[Tensor]) -> None:
        """The equations above."""
        (mean, square), (beta1, beta2) = moments, group["betas"]
        value.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        value.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))
