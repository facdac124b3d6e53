"""What the tests of optimizers share: a small network in float64, its step for an optimizer, and factors to move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import surgery
from tests.surgery import three_layers
from tests.surgery.three_layers import SITES as SITES

SIZES = (8, 8, 8, 6)
RANK = 3


class Network(three_layers.ThreeLayers):
    """Three layers, of which two have one shape: `[rows, 8]` to `[rows, 6]`."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(SIZES, dtype)


def batch(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """16 rows and their targets."""
    return three_layers.batch(seed, 16, SIZES, dtype)


def step_of(
    optimizer: str, method: str = f"lora(rank = {RANK}, alpha = 6)", settings: str = "", rules: str = "",
    dtype: torch.dtype = torch.float64,
) -> Any:  # fmt: skip
    """The training step of the network, adapted at all its layers."""
    program = surgery.parse(
        f"adapt {{{','.join(SITES)}}} {{ with {method} }}\n{rules}\n"
        f"step {{ optimizer = {optimizer}  loss = mse  compile = off  {settings} }}"
    )
    return surgery.compile(program, Network(dtype), {"x": batch(dtype)["x"]})


def factors(seed: int = 1, left_seed: int = 2, outputs: int = 8, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Left `[outputs, rank]` and right `[rank, 8]`."""
    left = torch.randn(outputs, rank, generator=torch.Generator().manual_seed(left_seed), dtype=torch.float64)
    right = torch.randn(rank, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return left, right


@torch.no_grad()
def put(step: Any, turn: Tensor | None = None) -> None:
    """Factors of full rank at all sites; `turn` R gives `B @ R` and `inverse(R) @ A`, of the same products."""
    for number, tensors in enumerate(step.parameters_by_site.values()):
        left, right = factors(10 * number, 10 * number + 1, len(tensors["B"]))
        if turn is not None:
            left, right = left @ turn, torch.linalg.solve(turn, right)
        tensors["B"].copy_(left * 0.3)
        tensors["A"].copy_(right)


def weights(step: Any) -> list[Tensor]:
    """What the sites multiply with."""
    return [step.effective_weight(path) for path in SITES]


def distance(one: Any, other: Any) -> float:
    """The largest difference of an entry of what the sites of two steps multiply with."""
    return max(float((mine - theirs).abs().max()) for mine, theirs in zip(weights(one), weights(other), strict=True))
