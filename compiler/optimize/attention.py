"""Grouped-query attention without repeated keys and values: all heads that share one read the same."""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from surgery.compiler.capture.causal import ATTENTION, size_of
from surgery.compiler.kernels.forms import HALF

_aten = torch.ops.aten
_RESHAPES = (_aten.reshape.default, _aten.view.default, _aten._unsafe_view.default)
_COPIES = (_aten.clone.default, _aten.contiguous.default)
# In half precision torch has a kernel on every device that takes groups, as long as there is no mask. What it has on a
# GPU for float32 or for wider heads refuses them: it would fall back to the plain product, with all [length, length]
# scores.
_WIDEST = 256


def group_queries(module: fx.GraphModule) -> int:
    """Let attention without a mask share keys and values among heads where they were repeated for them; in place.

    `key[:, :, None].expand(batch, heads, times, length, size).reshape(batch, heads * times, length, size)` is what
    `enable_gqa` means, in the same order. Returns how many attentions changed.
    """
    changed = 0
    for node in module.graph.nodes:
        if node.target is not ATTENTION or len(node.args) < 3 or "enable_gqa" in node.kwargs:
            continue
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        query = _value(node.args[0])
        if mask is not None or query is None or query.dtype not in HALF or query.ndim != 4:
            continue
        if not isinstance(query.shape[3], int) or query.shape[3] > _WIDEST:
            continue
        _, heads, _, size = _sizes(node.args[0])
        key, value = (unrepeated(argument, heads) for argument in node.args[1:3])
        if key is None or value is None or _sizes(key)[1] != _sizes(value)[1]:
            continue
        if not _sizes(key)[3] == _sizes(value)[3] == size:  # the kernel that takes groups takes one size alone
            continue
        node.args = (node.args[0], key, value, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        changed += 1
    return changed


def unrepeated(repeated: Any, heads: sympy.Expr) -> fx.Node | None:
    """What was repeated for all `heads` of the query, [batch, groups, length, size], if only the attention reads it."""
    expanded = _before(repeated, *_RESHAPES)
    while expanded is not None and expanded.target in _COPIES:
        expanded = _before(expanded, *_COPIES)
    inserted = _before(expanded, _aten.expand.default)
    source = _before(inserted, _aten.unsqueeze.default)
    if source is None or inserted is None or inserted.args[1] != 2 or source.meta["val"].ndim != 4:
        return None
    batch, groups, length, size = _sizes(source)
    times = heads / groups
    if not times.is_Integer or times == 1 or _sizes(expanded) != [batch, groups, times, length, size]:
        return None
    return source if _sizes(repeated) == [batch, heads, length, size] else None


def _before(node: Any, *operations: Any) -> fx.Node | None:
    """What one of these operations is applied to, if nothing else reads its result."""
    if not isinstance(node, fx.Node) or node.target not in operations or len(node.users) != 1:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) and _value(source) is not None else None


def _value(argument: Any) -> torch.Tensor | None:
    """The tensor that stands for a node's result, if it is known."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _sizes(node: Any) -> list[sympy.Expr]:
    return [size_of(size) for size in node.meta["val"].shape]
