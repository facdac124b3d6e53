"""Causal attention in rows of several documents, each of which sees itself alone, without a [length, length] mask.

On a GPU in half precision torch's flex attention skips what no token of a block of queries sees; everything that says
so is computed on the device, and has an entry for each two blocks of 128 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from surgery.compiler.kernels import forms

_BLOCK = 128  # tokens of a block of the mask
# Else torch takes another kernel for few queries, which is made for decoding.
_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}


def document_starts(position_ids: Tensor) -> Tensor:
    """For each token where its document starts in its row, of positions [rows, length]; int64 [rows, length].

    A document ends where the next position is not one more; it may start at any.
    """
    index = torch.arange(position_ids.shape[-1], device=position_ids.device)
    previous = functional.pad(position_ids[..., :-1] + 1, (1, 0))
    begins = (position_ids != previous) & (index > 0)
    return index.where(begins, 0).cummax(-1).values


def packed_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None = None) -> Tensor:
    """Attention [rows, heads, length, size] of each token to those from its document's start up to itself.

    `key` and `value` [rows, groups, length, size] may be shared by several heads in a row, `starts` is
    `document_starts(...)`, of all rows or of one for all. `scale` is one over the root of `size` if left out.
    """
    starts = starts.expand(query.shape[0], -1)
    if query.is_cuda and query.dtype in forms.HALF and forms.HAS_TRITON:
        run = _flex if torch.compiler.is_compiling() else _compiled()
        return run(query, key, value, starts, scale)
    return packed_attention_reference(query, key, value, starts, scale)


def packed_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None = None
) -> Tensor:
    """What `packed_attention` is by definition: it forms the mask [rows, 1, length, length]."""
    index = torch.arange(query.shape[2], device=query.device)
    mask = (index <= index[:, None]) & (index >= starts[:, :, None])
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=scale)


def _flex(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None) -> Tensor:
    result: Any = flex_attention(
        query, key, value, block_mask=block_mask(starts), scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=_OPTIONS,
    )  # fmt: skip
    return result  # type: ignore[no-any-return]


@cache
def _compiled() -> Callable[..., Tensor]:
    """The same for an eager caller: uncompiled, flex attention would form all scores."""
    return torch.compile(_flex, dynamic=True)


def block_mask(starts: Tensor) -> BlockMask:
    """Which blocks of keys a block of queries reads: those it sees as a whole, and those where each token decides."""
    rows, length = starts.shape
    count = -(-length // _BLOCK)
    block = torch.arange(count, device=starts.device)
    ends = (block * _BLOCK + _BLOCK - 1).clamp(max=length - 1)
    first = starts[:, block * _BLOCK] // _BLOCK  # starts never fall, so the first token sees furthest back
    whole = -(-starts[:, ends] // _BLOCK)  # from here on up to its own block the last token sees all, so all do
    whole = torch.minimum(whole, block)
    parts = whole - first  # then its own block, where what is seen ends at each token
    order = block[None, None]
    from_, until = first[:, :, None], parts[:, :, None]
    partly = torch.where(order < until, from_ + order, block[None, :, None]).clamp(max=count - 1)
    wholly = (whole[:, :, None] + order).clamp(max=count - 1)
    numbers = [found[:, None].to(torch.int32) for found in (parts + 1, partly, block - whole, wholly)]

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[row, query])

    made: Any = BlockMask.from_kv_blocks
    return made(*numbers, BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(length, length))  # type: ignore[no-any-return]
