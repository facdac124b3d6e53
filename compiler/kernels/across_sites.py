"""What an event reads off the scores of all sites of a rule together, on their device: no number comes to the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def keep_top(kept: Sequence[Tensor], scores: Sequence[Tensor], budget: float, axes: int | None = None) -> None:
    """Write ones into `kept` at the `budget * sites` largest entries of all scores, rounded down, and zeros elsewhere.

    Both have one tensor per site, of any shapes; with `axes`, those of one matrix's scores, what leads counts experts,
    each of which has the budget. Of equal scores the first ones stay, so that the count is exact.
    """
    flat = torch.cat([score.reshape(-1) for score in scores])
    own = [score.dim() if axes is None else axes for score in scores]
    matrices = sum(math.prod(score.shape[: score.dim() - count]) for score, count in zip(scores, own, strict=True))
    count = min(max(int(budget * matrices), 0), flat.numel())
    order = torch.sort(flat, descending=True, stable=True).indices
    chosen = torch.zeros_like(flat).scatter_(0, order[:count], 1.0)
    parts = torch.split(chosen, [score.numel() for score in scores])
    torch._foreach_copy_(list(kept), [part.view_as(one) for part, one in zip(parts, kept, strict=True)])


@torch.no_grad()
def quantile(found: Tensor, scores: Sequence[Tensor], share: float) -> None:
    """Write into `found`, 0-d, the number that a share of all entries lies below: linear between two of them."""
    values = torch.sort(torch.cat([score.reshape(-1) for score in scores])).values
    place = share * (values.numel() - 1)
    low = math.floor(place)
    found.copy_(torch.lerp(values[low], values[min(low + 1, values.numel() - 1)], place - low))
