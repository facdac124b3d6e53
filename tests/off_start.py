"""The tensors of a method away from their start, where a change of W is often zero."""

from __future__ import annotations

from typing import Any

import torch


def off_start(step: Any, spread: float, seed: int) -> None:
    """Add normal noise to the trained tensors of a step's sites; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in step.plan.sites:
            for tensor in site.tensors:
                if tensor.role == "train":
                    values = step.parameters_by_site[site.path][tensor.name]
                    values.add_(spread * torch.randn(values.shape, generator=generator).to(values))
