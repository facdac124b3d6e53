"""The low-rank linear from torch's own matrix products, on any device and in any dtype.

The scale stays on the narrow side of each product, and sums are accumulated by the products themselves (`addmm_`), so
that no pass over a wide tensor does nothing but add or scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def spans(ranks: Sequence[int]) -> list[slice]:
    """The columns of each site in a matrix `[rows, sum of ranks]`."""
    return [slice(end - rank, end) for end, rank in zip(accumulate(ranks), ranks, strict=True)]


def joined(rights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All rights under each other, `[sum of ranks, in]`."""
    if len(rights) == 1:
        return rights[0].to(dtype)
    if all(right.dtype == dtype for right in rights):
        return torch.cat([*rights])
    ranks = [right.shape[0] for right in rights]
    whole = torch.empty(sum(ranks), rights[0].shape[1], dtype=dtype, device=rights[0].device)
    torch._foreach_copy_(torch.split(whole, ranks), [*rights])  # joins and casts in one launch
    return whole


def cast(factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The factors in a dtype, by one launch for all."""
    if all(factor.dtype == dtype for factor in factors):
        return [*factors]
    results = [torch.empty_like(factor, dtype=dtype) for factor in factors]
    torch._foreach_copy_(results, [*factors])
    return results


def narrow_product(rows: Tensor, rights: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """`scale * rows @ right.T` of every site beside each other, `[rows, sum of ranks]` from one product."""
    right = joined(rights, rows.dtype)
    u = rows.new_empty(rows.shape[0], right.shape[0])
    if len({*scales}) == 1:
        return _into(u, rows, right.T, scales[0])
    _into(u, rows, right.T)
    for span, scale in zip(spans([right.shape[0] for right in rights]), scales, strict=True):
        u[:, span].mul_(scale)
    return u


def narrow_gradients(
    dys: Sequence[Tensor], u: Tensor, lefts: Sequence[Tensor], scales: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """`scale * dy @ left` of every site beside each other, like u, and each site's `dy.T @ u`, like its left."""
    return narrow_gradient(dys, lefts, scales), left_gradients(dys, u, lefts)


def narrow_gradient(dys: Sequence[Tensor], lefts: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """`scale * dy @ left` of every site beside each other, `[rows, sum of ranks]`."""
    du = dys[0].new_empty(dys[0].shape[0], sum(left.shape[1] for left in lefts))
    lefts = cast(lefts, du.dtype)
    for dy, left, scale, span in zip(dys, lefts, scales, spans([left.shape[1] for left in lefts]), strict=True):
        _into(du[:, span], dy, left, scale)
    return du


def _into(result: Tensor, wide: Tensor, narrow: Tensor, scale: float = 1.0) -> Tensor:
    """Writes `scale * wide @ narrow` for a narrow matrix of few columns."""
    if wide.is_cpu:  # its libraries are up to three times quicker where the narrow side is the left one
        return torch.mul((narrow.T @ wide.T).T, scale, out=result)
    return result.addmm_(wide, narrow, beta=0, alpha=scale)


def left_gradients(dys: Sequence[Tensor], u: Tensor, lefts: Sequence[Tensor]) -> list[Tensor]:
    """Each site's `dy.T @ u`, `[out, rank]`."""
    columns = (u[:, span] for span in spans([left.shape[1] for left in lefts]))
    return [_product(dy.T, part, left.dtype) for dy, part, left in zip(dys, columns, lefts, strict=True)]


def right_gradients(du: Tensor, rows: Tensor, rights: Sequence[Tensor]) -> list[Tensor]:
    """`du.T @ rows` of every site, `[rank, in]` each, from one product."""
    if len(rights) == 1:
        return [_product(du.T, rows, rights[0].dtype)]
    dtypes = {right.dtype for right in rights}
    whole = _product(du.T, rows, dtypes.pop() if len(dtypes) == 1 else du.dtype)
    parts = torch.ops.aten.split_with_sizes_copy(whole, [right.shape[0] for right in rights])
    return [part.to(right.dtype) for part, right in zip(parts, rights, strict=True)]


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right` in a dtype; on a GPU a float32 result keeps the product's precision and needs no cast."""
    if left.is_cuda and dtype == torch.float32 != left.dtype and left.dtype != torch.float64:
        return torch.mm(left, right, out_dtype=dtype)
    if left.is_cpu and left.shape[0] > right.shape[1]:  # up to eight times quicker with the narrow side in front
        return (right.T @ left.T).T.to(dtype).contiguous()
    return (left @ right).to(dtype)


def outputs(
    rows: Tensor, u: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lefts: Sequence[Tensor]
) -> list[Tensor]:
    """`rows @ weight.T + bias + u @ left.T` of each site, `[rows, out]` each; u has the columns of all sites."""
    result = []
    columns = (u[:, span] for span in spans([left.shape[1] for left in lefts]))
    for weight, bias, left, part in zip(weights, biases, cast(lefts, u.dtype), columns, strict=True):
        # the narrow product first: what it rounds is then the small change, not the sum
        y = part @ left.T if bias is None else torch.addmm(bias, part, left.T)
        result.append(y.addmm_(rows, weight.T))
    return result


def input_gradient(
    dys: Sequence[Tensor], weights: Sequence[Tensor], du: Tensor | None, rights: Sequence[Tensor]
) -> Tensor:
    """The sum of `dy @ weight` over the sites, and of `du @ right` if du is given, `[rows, in]`."""
    products = [*zip(dys, weights, strict=True)]
    if du is not None:
        products.insert(0, (du, joined(rights, du.dtype)))
    dx = products[0][0] @ products[0][1]
    for dy, weight in products[1:]:
        dx.addmm_(dy, weight)
    return dx
