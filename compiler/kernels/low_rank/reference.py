"""What `low_rank_linear` is by definition, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def low_rank_linear_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lefts: Sequence[Tensor],
    rights: Sequence[Tensor], scales: Sequence[float], narrow: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """`x @ weight.T + bias + scale * (narrow @ right.T) @ left.T` of each site; autograd gives its gradients.

    x and narrow are `[..., in]` of one dtype, each weight `[out, in]` has it too; a left is
    `[out, rank]`, a right `[rank, in]`, of any floating dtype. Where `narrow` is None, x takes its place.
    """
    source = x if narrow is None else narrow
    return [
        functional.linear(x, weight, bias) + scale * (source @ right.to(x.dtype).T) @ left.to(x.dtype).T
        for weight, bias, left, right, scale in zip(weights, biases, lefts, rights, scales, strict=True)
    ]
