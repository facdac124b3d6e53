"""A network of three linear layers, which most tests of optimizers and procedures adapt, and batches for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SITES = ("first", "second", "third")
SIZES = (6, 8, 7, 5)  # of the input, and of what each layer gives


class ThreeLayers(nn.Module):
    """Linears with tanh between them: `[rows, sizes[0]]` to `[rows, sizes[-1]]`, the same numbers each time."""

    def __init__(self, sizes: tuple[int, int, int, int] = SIZES, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second, self.third = (nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the third layer."""
        found: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return found


def batch(
    number: int, rows: int = 8, sizes: tuple[int, int, int, int] = SIZES, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Inputs and what they should give; others for each number."""
    draw = torch.Generator().manual_seed(number)
    return {
        name: torch.randn(rows, size, generator=draw, dtype=dtype)
        for name, size in (("x", sizes[0]), ("labels", sizes[-1]))
    }
