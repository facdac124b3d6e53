"""The low-rank linear from torch's own matrix products, on any device and in any dtype.

The scale stays on the narrow side of each product, and sums are accumulated by the products themselves (`addmm_`), so
that no pass over a wide tensor does nothing but add or scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def spans(rights: Sequence[Tensor]) -> list[slice]:
    """The columns of each site in a matrix `[rows, sum of ranks]`."""
    ends = list(accumulate(right.shape[0] for right in rights))
    return [slice(end - right.shape[0], end) for end, right in zip(ends, rights, strict=True)]


def joined(rights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All rights under each other, `[sum of ranks, in]`."""
    return (rights[0] if len(rights) == 1 else torch.cat([*rights])).to(dtype)


def narrow_product(rows: Tensor, rights: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """`scale * rows @ right.T` of every site beside each other, `[rows, sum of ranks]` from one product."""
    right = joined(rights, rows.dtype)
    u = rows.new_empty(rows.shape[0], right.shape[0])
    if len({*scales}) == 1:
        return u.addmm_(rows, right.T, beta=0, alpha=scales[0])
    torch.mm(rows, right.T, out=u)
    for span, scale in zip(spans(rights), scales, strict=True):
        u[:, span].mul_(scale)
    return u


def narrow_gradient(dy: Tensor, left: Tensor, scale: float, du: Tensor) -> None:
    """Writes `scale * dy @ left` to `du` `[rows, rank]`, which may be columns of a wider matrix."""
    du.addmm_(dy, left.to(dy.dtype), beta=0, alpha=scale)


def left_gradient(dy: Tensor, u: Tensor, left: Tensor) -> Tensor:
    """`dy.T @ u`, `[out, rank]`."""
    return (dy.T @ u).to(left.dtype)


def right_gradients(du: Tensor, rows: Tensor, rights: Sequence[Tensor]) -> list[Tensor]:
    """`du.T @ rows` of every site, `[rank, in]` each, from one product."""
    whole = du.T @ rows
    if len(rights) == 1:
        return [whole.to(rights[0].dtype)]
    parts = torch.split_with_sizes_copy(whole, [right.shape[0] for right in rights])
    return [part.to(right.dtype) for part, right in zip(parts, rights, strict=True)]


def outputs(
    rows: Tensor, u: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """`rows @ weight.T + bias + u @ left.T` of each site, `[rows, out]` each."""
    result = []
    for weight, bias, left, span in zip(weights, biases, lefts, spans(rights), strict=True):
        narrow = left.to(rows.dtype).T
        # the narrow product first: what it rounds is then the small change, not the sum
        y = u[:, span] @ narrow if bias is None else torch.addmm(bias, u[:, span], narrow)
        result.append(y.addmm_(rows, weight.T))
    return result


def input_gradient(dys: Sequence[Tensor], weights: Sequence[Tensor], du: Tensor | None, right: Tensor | None) -> Tensor:
    """The sum of `dy @ weight` over the sites, and `du @ right` where the change reads the same input: `[rows, in]`."""
    products = [*zip(dys, weights, strict=True)]
    if du is not None and right is not None:
        products.insert(0, (du, right))
    dx = products[0][0] @ products[0][1]
    for dy, weight in products[1:]:
        dx.addmm_(dy, weight)
    return dx
