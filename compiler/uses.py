"""Where and how a graph uses a weight: the operations that p6 knows, in exported graphs and in symbolic traces."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from surgery.compiler.algebra.base import Base, Convolution, Diagonal, Lookup, Output, Quantized
from surgery.compiler.algebra.experts import Experts
from surgery.compiler.algebra.expression import Expression, rewriting
from surgery.compiler.algebra.formula import MethodFormula, Term
from surgery.compiler.algebra.narrow import turned
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.kernels.quantized_linear import quantized_linear
from surgery.compiler.plan import Site

aten = torch.ops.aten
# Each operation by the names of its arguments, in their order.
LINEAR: dict[Any, tuple[str, ...]] = dict.fromkeys(
    (aten.linear.default, functional.linear), ("input", "weight", "bias")
)
PRODUCT: dict[Any, tuple[str, ...]] = dict.fromkeys(
    (aten.matmul.default, aten.mm.default, torch.matmul, torch.mm, operator.matmul), ("input", "weight")
)
ADDMM: dict[Any, tuple[str, ...]] = dict.fromkeys((aten.addmm.default, torch.addmm), ("bias", "input", "weight"))
EMBEDDING: dict[Any, tuple[str, ...]] = {
    aten.embedding.default: ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"),
    functional.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
}
CONVOLUTION: dict[Any, tuple[str, ...]] = dict.fromkeys(
    (aten.conv2d.default, aten.conv2d.padding, functional.conv2d),
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
)
SCALE: dict[Any, tuple[str, ...]] = dict.fromkeys((aten.mul.Tensor, torch.mul, operator.mul), ("left", "right"))
LAYER_NORM: dict[Any, tuple[str, ...]] = dict.fromkeys(
    (aten.layer_norm.default, functional.layer_norm),
    ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
)
RMS_NORM: dict[Any, tuple[str, ...]] = dict.fromkeys(
    (aten.rms_norm.default, functional.rms_norm), ("input", "normalized_shape", "weight", "eps")
)
QUANTIZED: dict[Any, tuple[str, ...]] = {quantized_linear: ("input", "weight", "scale", "bias", "transposed")}
GROUPED = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
TRANSPOSE = (aten.t.default, aten.numpy_T.default, aten.mT.default, torch.t)
TRANSPOSE_OF_AXES = (aten.transpose.int, torch.transpose)


@dataclass(frozen=True)
class Use:
    """One operation on a site's weight: the node to replace, what it reads, and the algebra of its kind.

    `base` makes the `Base` of the weight and the tensors of `extra`; W is transposed against the site's own where
    `flipped`, as the embedding of a head is.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    base: Callable[..., Base]
    flipped: bool = False
    extra: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Misuse:
    """An operation that cannot be adapted, and why."""

    node: fx.Node
    reason: str


def uses_of(weight: fx.Node, site: Site, dtype: torch.dtype) -> Iterator[Use | Misuse]:
    """Every use of a weight that a `get_attr` node reads, through views of it that swap its axes."""
    yield from _walk(weight, weight, False, site, dtype)


def _walk(weight: fx.Node, view: fx.Node, swapped: bool, site: Site, dtype: torch.dtype) -> Iterator[Use | Misuse]:
    for node in list(view.users):
        if _swaps(node, site):
            yield from _walk(weight, node, not swapped, site, dtype)
        elif _changes_nothing(node, dtype):
            yield from _walk(weight, node, swapped, site, dtype)
        else:
            yield _use(node, weight, view, swapped, site, dtype)


def _swaps(node: fx.Node, site: Site) -> bool:
    if site.module_class in ("Conv2d", "Norm"):
        return False
    if node.target in TRANSPOSE or (node.op == "call_method" and node.target == "t"):
        return site.experts is None or node.target is aten.mT.default
    if node.target in TRANSPOSE_OF_AXES or (node.op == "call_method" and node.target == "transpose"):
        last = {-1, -2} if site.experts else {-1, -2, 0, 1}
        axes = {axis for axis in node.args[1:3] if isinstance(axis, int)}
        size = 3 if site.experts else 2
        return axes <= last | {1, 2} and {axis % size for axis in axes} == {size - 1, size - 2}
    return getattr(node.target, "__name__", "") == "getattr" and node.args[1:] in (("T",), ("mT",))


def _changes_nothing(node: fx.Node, dtype: torch.dtype) -> bool:
    return node.target is aten.to.dtype and len(node.args) == 2 and node.args[1] is dtype


def _use(node: fx.Node, weight: fx.Node, view: fx.Node, swapped: bool, site: Site, dtype: torch.dtype) -> Use | Misuse:
    found: Use | str | None = None
    if site.module_class == "Experts":
        found = _experts(node, weight, view, swapped, site, dtype)
    for operations, read in READERS.get(site.module_class, MATRIX):
        if node.target in operations:
            found = read(_arguments(node, operations[node.target]), weight, view, swapped, site, dtype, node)
    if isinstance(found, Use):
        return found
    return Misuse(node, found or f"it is used by {node.target}")


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _matrix(
    given: dict[str, Any], weight: fx.Node, view: fx.Node, swapped: bool, site: Site, dtype: torch.dtype, node: fx.Node
) -> Use | str | None:
    """`x @ W.T + b` in any of its spellings: a linear layer takes W as [out, in], a product as [in, out]."""
    x, bias = given.get("input"), given.get("bias")
    if given.get("weight") is not view or not isinstance(x, fx.Node) or set(given) - {"input", "weight", "bias"}:
        return None
    transposed = swapped if node.target in LINEAR else not swapped
    base = partial(Base, transposed=transposed, dtype=dtype)
    own_bias = bias if isinstance(bias, fx.Node) else None
    return Use(node, x, weight, own_bias, base, flipped=transposed != site.transposed)


def _quantized(
    given: dict[str, Any], weight: fx.Node, view: fx.Node, swapped: bool, site: Site, dtype: torch.dtype, node: fx.Node
) -> Use | str | None:
    x, bias = given["input"], given.get("bias")
    if given["weight"] is not view or swapped or not isinstance(x, fx.Node) or given.get("transposed"):
        return None

    def base(codes: Tensor, scale: Tensor) -> Base:
        return Quantized(codes, False, dtype, scale)

    return Use(node, x, weight, bias if isinstance(bias, fx.Node) else None, base, extra=(given["scale"],))


def _lookup(
    given: dict[str, Any], weight: fx.Node, view: fx.Node, swapped: bool, site: Site, dtype: torch.dtype, node: fx.Node
) -> Use | str | None:
    x = given["input"]
    if given["weight"] is not view or swapped or not isinstance(x, fx.Node) or given.get("max_norm") is not None:
        return None
    base = partial(Lookup, transposed=True, dtype=dtype, vocabulary=site.shape[1 if site.transposed else 0])
    return Use(node, x, weight, None, base, flipped=not site.transposed)


def _convolution(
    given: dict[str, Any], weight: fx.Node, view: fx.Node, swapped: bool, site: Site, dtype: torch.dtype, node: fx.Node
) -> Use | str | None:
    x, bias = given["input"], given.get("bias")
    if given["weight"] is not view or not isinstance(x, fx.Node):
        return None
    if given.get("groups", 1) != 1:
        return "a convolution in groups has a weight for each of them, not one matrix"
    base = partial(
        Convolution, transposed=False, dtype=dtype, kernel=site.kernel,
        channels=site.shape[1] // (site.kernel[0] * site.kernel[1]), stride=_sizes(given.get("stride", 1)),
        padding=_sizes(given.get("padding", 0)), dilation=_sizes(given.get("dilation", 1)),
    )  # fmt: skip
    return Use(node, x, weight, bias if isinstance(bias, fx.Node) else None, base)


def _sizes(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


def _scale(
    given: dict[str, Any], weight: fx.Node, view: fx.Node, swapped: bool, site: Site, dtype: torch.dtype, node: fx.Node
) -> Use | str | None:
    sides = list(given.values())
    (x,) = [side for side in sides if side is not view] or [None]
    if not isinstance(x, fx.Node):
        return None
    return Use(node, x, weight, None, partial(Diagonal, transposed=False, dtype=dtype))


def _experts(
    node: fx.Node, weight: fx.Node, view: fx.Node, swapped: bool, site: Site, dtype: torch.dtype
) -> Use | str | None:
    """A grouped product of rows that are sorted by expert."""
    given = _arguments(node, ("input", "weight", "offs"))
    x, ends = given.get("input"), given.get("offs")
    if str(node.target) not in GROUPED or given.get("weight") is not view or set(given) != {"input", "weight", "offs"}:
        return f"it is used by {node.target}; of the ways to run experts only `grouped_mm` can be adapted"
    if swapped == site.transposed or not isinstance(x, fx.Node) or not isinstance(ends, fx.Node):
        return "its experts are used in another orientation than their class says"
    grouped: Any = node.target

    def base(stored: Tensor, ends: Tensor) -> Base:
        return Experts(stored, site.transposed, dtype, ends, grouped)

    return Use(node, x, weight, None, base, extra=(ends,))


def _norm(
    given: dict[str, Any], weight: fx.Node, view: fx.Node, swapped: bool, site: Site, dtype: torch.dtype, node: fx.Node
) -> Use | str | None:
    """A normalisation with its weight and bias: the same one without them is put in front, and gives x."""
    if given["weight"] is not view or list(given["normalized_shape"]) != [site.shape[0]]:
        return None
    bias = given.get("bias")
    plain = (given["input"], given["normalized_shape"], None)
    rest = (None, given.get("eps", 1e-5)) if node.target in LAYER_NORM else (given.get("eps"),)
    with node.graph.inserting_before(node):
        x = node.graph.create_node("call_function", node.target, (*plain, *rest))
    x.meta = dict(node.meta)
    return Use(
        node, x, weight, bias if isinstance(bias, fx.Node) else None, partial(Diagonal, transposed=False, dtype=dtype)
    )


MATRIX = ((QUANTIZED, _quantized), (LINEAR, _matrix), (PRODUCT, _matrix), (ADDMM, _matrix), (EMBEDDING, _lookup))
READERS: dict[str, Any] = {
    "Experts": (),
    "Conv2d": ((CONVOLUTION, _convolution),),
    "Norm": ((SCALE, _scale), (LAYER_NORM, _norm), (RMS_NORM, _norm)),
}


def outputs_of(graph: fx.Graph, site: Site) -> list[Use]:
    """The tensor `[..., out]` that each call of a module gives to others; none at all where one gives several."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        call = call_of(node, site.path)
        value = node.meta.get("val")
        if call is None or not isinstance(value, Tensor) or all(call_of(user, site.path) for user in node.users):
            continue
        if value.is_floating_point() and value.dim() > 1 and value.shape[-1] == site.shape[0]:
            calls.setdefault(call, []).append(node)
    if any(len(nodes) != 1 for nodes in calls.values()):
        return []
    found = [node for nodes in calls.values() for node in nodes]
    return [
        Use(node, node, None, None, partial(Output, transposed=False, dtype=node.meta["val"].dtype)) for node in found
    ]


def call_of(node: fx.Node, path: str) -> str | None:
    """Which call of a module a node belongs to; None for one outside of it."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((key for key, (owner, _) in stack.items() if owner == path), None)


def flipped(formula: MethodFormula) -> MethodFormula:
    """A `delta` or `weight` formula for a use whose W is the site's transposed, as that of a tied head's embedding."""
    over_turned_weight, resized = rewriting(_over_turned_weight), rewriting(partial(_resized, size=formula.shape[0]))

    def other_way(matrix: Expression) -> Expression:
        return turned(over_turned_weight(matrix))

    terms = tuple(Term(other_way(term.matrix), resized(term.input)) for term in formula.terms)
    return replace(formula, expression=other_way(formula.expression), terms=terms)


def _resized(rows: Expression, size: Quantity) -> Expression:
    """x, perhaps with dropout, of the other side's size."""
    return replace(rows, shape=(rows.shape[0], size)) if rows.shape else rows


def _over_turned_weight(node: Expression) -> Expression:
    """W as the transposed of what is turned."""
    if node.operation != "weight":
        return node
    return Expression("transpose", (replace(node, shape=(node.shape[1], node.shape[0])),), node.shape)


def inline(module: fx.GraphModule, node: fx.Node) -> None:
    """Put what a called module computes in the call's place, over the module's own parameters; in place."""
    path = str(node.target)
    traced = fx.symbolic_trace(module.get_submodule(path))
    inputs = iter(node.args)
    known: dict[fx.Node, Any] = {}
    for inner in traced.graph.nodes:
        with module.graph.inserting_before(node):
            match inner.op:
                case "placeholder":
                    default = inner.args[0] if inner.args else None
                    known[inner] = node.kwargs.get(str(inner.target), next(inputs, default))
                case "output":
                    node.replace_all_uses_with(fx.node.map_arg(inner.args[0], lambda used: known[used]))
                case "get_attr":
                    known[inner] = module.graph.get_attr(f"{path}.{inner.target}")
                case _:
                    known[inner] = module.graph.node_copy(inner, lambda used: known[used])
        if isinstance(known.get(inner), fx.Node) and inner.op not in ("placeholder", "output"):
            known[inner].meta = dict(node.meta)
    module.graph.erase_node(node)
