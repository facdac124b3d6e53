"""Give causal attention back its `is_causal`: an exported mask keeps flash attention away and says nothing new."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import sympy  # type: ignore[import-untyped]
import torch
import torch.utils._pytree as pytree
from torch import SymInt, Tensor, fx, nn
from torch.fx.node import map_arg

from surgery.compiler.graph import drop_dead_nodes, tensors, writes

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
LONGEST = 8192  # a mask of 8192 x 8192 is evaluated in a moment; one with a larger constant in it stays as it is
_SHAPE_ONLY = {
    # The first argument's values are not read, only its shape, dtype and device.
    torch.ops.aten.new_ones.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.new_full.default,
    torch.ops.aten.ones_like.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.full_like.default,
}
Verdict = Literal["causal", "nothing", "other"]
Sizes = dict[sympy.Expr, int]


def restore_causal(module: fx.GraphModule) -> int:
    """Replace, in place, each mask that is provably plain causal by `is_causal`, and one that masks nothing by none.

    Provably: the mask depends on sizes alone, and at several lengths, one of them larger than every whole number in
    its subgraph (so that a sliding window shows), it is the lower triangle, as a boolean or as an additive mask.
    Returns how many attention nodes changed.
    """
    named = tensors(module)
    verdicts: dict[tuple[Any, ...], Verdict] = {}
    changed = 0
    for node in module.graph.nodes:
        if node.target is not ATTENTION:
            continue
        mask = argument(node, 3, "attn_mask", None)
        if not isinstance(mask, fx.Node) or argument(node, 5, "is_causal", False) is not False:
            continue
        query, key = (node.args[position].meta["val"].shape for position in (0, 1))
        sizes = (query[0], query[-2], key[-2])
        case = (mask, *map(size_of, sizes))
        if case not in verdicts:
            verdicts[case] = _judge(module.graph, named, mask, sizes)
        if verdicts[case] == "other":
            continue
        dropout = argument(node, 4, "dropout_p", 0.0)
        node.kwargs = {name: node.kwargs[name] for name in ("scale", "enable_gqa") if name in node.kwargs}
        node.args = (*node.args[:3], None, dropout, verdicts[case] == "causal")
        changed += 1
    drop_dead_nodes(module.graph)
    module.recompile()
    return changed


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument of an operation, given by place, by name or not at all."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def size_of(size: int | SymInt) -> sympy.Expr:
    """A size as an expression, which compares without a guard."""
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)


def _judge(graph: fx.Graph, named: dict[str, Tensor], mask: fx.Node, sizes: tuple[int | SymInt, ...]) -> Verdict:
    nodes = sources(graph, named, mask)
    if nodes is None:
        return "other"
    largest = largest_number(nodes, named)
    if largest >= LONGEST and isinstance(sizes[1], SymInt):
        return "other"
    found: set[Verdict] = set()
    for batch, length in ((2, 3), (3, 8), (2, 17), (1, largest + 9)):
        chosen = choose(sizes, batch, length)
        if chosen is None:
            return "other"
        try:
            found.add(_classify(evaluate(nodes, named, mask, chosen), size_of(sizes[1]) == size_of(sizes[2])))
        except (RuntimeError, IndexError, KeyError):  # not defined at this length, so nothing is proved
            return "other"
    return found.pop() if len(found) == 1 else "other"


def choose(sizes: tuple[int | SymInt, ...], batch: int, length: int) -> Sizes | None:
    """A number for each symbol of the attention's sizes; a query and a key length of their own differ in it."""
    chosen: Sizes = {}
    for size, number in zip(sizes, (batch, length, length + 4), strict=True):
        expression = size_of(size)
        if expression.is_Symbol:
            chosen.setdefault(expression, number)
        elif not expression.is_Integer:
            return None
    return chosen


def sources(
    graph: fx.Graph, named: dict[str, Tensor], mask: fx.Node, given: fx.Node | None = None
) -> list[fx.Node] | None:
    """The mask's subgraph in order, or None if a value that is no size (an input, a parameter) reaches it.

    The input `given` may.
    """
    wanted: set[fx.Node] = set()
    waiting = [mask]
    while waiting:
        node = waiting.pop()
        if node in wanted or node is given:
            continue
        if isinstance(node.meta.get("val"), (int, SymInt)):
            continue  # a size: known from its expression
        wanted.add(node)
        if node.op == "placeholder" or (node.op == "get_attr" and not _is_constant(named, node)):
            return None
        if writes(node) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        shape_only = node.target in _SHAPE_ONLY
        waiting += [source for source in node.all_input_nodes if not (shape_only and source is node.args[0])]
    return [node for node in graph.nodes if node in wanted]


def _is_constant(named: dict[str, Tensor], node: fx.Node) -> bool:
    tensor = named[str(node.target)]
    return not isinstance(tensor, nn.Parameter) and not tensor.is_meta and not any(map(writes, node.users))


def largest_number(nodes: list[fx.Node], named: dict[str, Tensor]) -> int:
    """The largest whole number in a mask's subgraph: a window that is no wider shows at a length beyond it."""
    return max((abs(number) for node in nodes for number in _numbers(named, node)), default=0)


def _numbers(named: dict[str, Tensor], node: fx.Node) -> Iterator[int]:
    """Every whole number that could be a length: arguments, and the entries or sizes of constant tensors."""
    if node.op == "get_attr":
        tensor = named[str(node.target)]
        yield from tensor.shape
        if tensor.numel() == 1 and abs(number := tensor.item()) < 2**31:
            yield int(number)
    for value in pytree.tree_leaves((node.args, node.kwargs)):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**31:
            yield int(value)


def evaluate(
    nodes: list[fx.Node], named: dict[str, Tensor], mask: fx.Node, chosen: Sizes,
    given: dict[fx.Node, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The mask at the chosen sizes, on the CPU. Raises KeyError where a size depends on anything else."""
    values: dict[fx.Node, Any] = {**(given or {})}
    readers = {node: len(node.users) for node in nodes}

    def read(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        example = node.meta["val"]
        if isinstance(example, (int, SymInt)):
            return number_of(example, chosen)
        # Only the shape of this one is read, and its values come from the model's inputs.
        return torch.empty([number_of(size, chosen) for size in example.shape], dtype=example.dtype)

    for node in nodes:
        if node.op == "get_attr":
            values[node] = named[str(node.target)].detach().cpu()
        else:
            arguments = map_arg(node.args, read)
            keywords = {**map_arg(node.kwargs, read)}
            if "device" in keywords:
                keywords["device"] = torch.device("cpu")
            assert callable(node.target)
            with torch.no_grad():
                values[node] = node.target(*arguments, **keywords)
        for source in node.all_input_nodes:  # a long mask is large: let go of what was its last reader's
            if source in readers:
                readers[source] -= 1
                if readers[source] == 0 and source is not mask:
                    values.pop(source, None)
    result = values[mask]
    assert isinstance(result, Tensor)
    return result


def number_of(size: int | SymInt, chosen: Sizes) -> int:
    """A size at the chosen ones; raises KeyError where it depends on anything else."""
    number = size_of(size).xreplace({symbol: sympy.Integer(value) for symbol, value in chosen.items()})
    if not number.is_Integer:
        raise KeyError(str(size))
    return int(number)


def seen_by(mask: Tensor) -> Tensor | None:
    """What a mask leaves to be seen, as booleans; None if it weakens anything instead of hiding it."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    return seen if bool((seen | (mask <= torch.finfo(mask.dtype).min)).all()) else None


def _classify(mask: Tensor, square: bool) -> Verdict:
    seen = seen_by(mask)
    if seen is None:
        return "other"
    if seen.all():
        return "nothing"
    if square and mask.dim() >= 2 and mask.shape[-2] == mask.shape[-1]:
        triangle = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
        if (seen == triangle).all():
            return "causal"
    return "other"
