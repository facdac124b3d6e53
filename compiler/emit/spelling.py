"""One graph node as one Python expression that a person would have written; `torch.ops.aten....` where there is none.

Every spelling calls the very operation of the node with the same arguments, so the text computes bitwise what the graph
does. Arguments are spelt in the order in which Python evaluates them.
"""

from __future__ import annotations

import builtins
import json
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from surgery.compiler.diagnostics import fail

ATOM, POWER, UNARY, PRODUCT, SUM, BIT_AND, BIT_OR, COMPARISON = 9, 8, 7, 6, 5, 4, 3, 2
_END = 2**63 - 1


class Text(NamedTuple):
    """Python source of an expression and how tightly it binds."""

    source: str
    precedence: int = ATOM


Argument = Callable[[fx.Node], Text]

_INFIX = {
    "add.Tensor": ("+", SUM),
    "add.Scalar": ("+", SUM),
    "sub.Tensor": ("-", SUM),
    "sub.Scalar": ("-", SUM),
    "mul.Tensor": ("*", PRODUCT),
    "mul.Scalar": ("*", PRODUCT),
    "div.Tensor": ("/", PRODUCT),
    "div.Scalar": ("/", PRODUCT),
    "matmul.default": ("@", PRODUCT),
    "__and__.Tensor": ("&", BIT_AND),
    "__or__.Tensor": ("|", BIT_OR),
    "bitwise_and.Tensor": ("&", BIT_AND),
    "bitwise_or.Tensor": ("|", BIT_OR),
    **{
        f"{name}.{kind}": (sign, COMPARISON)
        for name, sign in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="))
        for kind in ("Tensor", "Scalar")
    },
}
_OPERATORS: dict[Any, tuple[str, int]] = {
    operator.add: ("+", SUM),
    operator.sub: ("-", SUM),
    operator.mul: ("*", PRODUCT),
    operator.matmul: ("@", PRODUCT),
    torch.matmul: ("@", PRODUCT),
    operator.floordiv: ("//", PRODUCT),
    operator.truediv: ("/", PRODUCT),
    operator.mod: ("%", PRODUCT),
    operator.pow: ("**", POWER),
    operator.and_: ("&", BIT_AND),
    operator.or_: ("|", BIT_OR),
    operator.eq: ("==", COMPARISON),
    operator.ne: ("!=", COMPARISON),
    operator.lt: ("<", COMPARISON),
    operator.le: ("<=", COMPARISON),
    operator.gt: (">", COMPARISON),
    operator.ge: (">=", COMPARISON),
}
# aten's arguments are the method's, in the same order.
_METHODS = {
    "view.default", "reshape.default", "transpose.int", "permute.default", "expand.default", "unsqueeze.default",
    "squeeze.dim", "squeeze.default", "squeeze.dims", "contiguous.default", "flatten.using_ints", "to.dtype",
    "to.device", "masked_fill.Scalar", "masked_fill.Tensor", "cumsum.default", "type_as.default", "clone.default",
    "detach.default", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "mean.default", "mean.dim", "sum.default",
    "sum.dim_IntList", "amax.default", "amin.default", "gather.default", "index_select.default", "repeat.default",
    "split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int", "t.default", "unflatten.int",
    "expand_as.default", "view_as.default", "any.dim", "any.default", "all.default", "all.dim", "argmax.default",
    "roll.default", "diagonal.default", "sub_.Tensor", "add_.Tensor", "mul_.Tensor", "copy_.default",
    "addmm_.default", "zero_.default", "swapaxes.default", "narrow.default", "new_ones.default",
    "new_zeros.default", "new_full.default", "argsort.default", "float_power.Tensor_Scalar",
}  # fmt: skip
_TORCH = {
    "abs", "acos", "addmm", "arange", "asin", "baddbmm", "bernoulli", "bmm", "bucketize", "cat", "ceil", "clamp",
    "cos", "cosh", "diff", "empty_like", "erf", "exp", "expm1", "eye", "floor", "fmod", "full", "full_like", "ge",
    "isfinite", "isnan", "isinf", "linspace", "log", "log1p", "log2", "logical_and", "logical_not", "logical_or",
    "logical_xor", "maximum", "minimum", "mm", "mv", "ones", "ones_like", "outer", "pad", "reciprocal", "remainder",
    "repeat_interleave", "round", "rsqrt", "scalar_tensor", "searchsorted", "sigmoid", "sign", "sin", "sinh",
    "sqrt", "stack", "tan", "tanh", "tril", "triu", "where", "zeros", "zeros_like", "softmax", "log_softmax",
    "sort", "histc", "floor_divide", "index_put", "cumprod", "topk", "square", "batch_norm", "rand_like",
    "bitwise_not", "randn_like", "diag", "diag_embed", "one_hot", "gather", "rms_norm", "hstack", "vstack", "kron",
    "flip", "div",
}  # fmt: skip
_FUNCTIONAL = {
    "linear", "layer_norm", "group_norm", "relu", "silu", "gelu", "conv1d", "conv2d", "conv3d", "dropout",
    "softplus", "hardtanh", "mish", "pad", "one_hot", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
    "scaled_dot_product_attention",
}  # fmt: skip
# What a factory function has by default: naming it tells the reader nothing.
_SILENT = {
    "pin_memory": (False, None),
    "layout": (torch.strided, None),
    "non_blocking": (False,),
    "copy": (False,),
    "inplace": (False,),
}


def spell(node: fx.Node, argument: Argument) -> Text:
    """The expression of a node that computes something; `argument` gives the text of the nodes that it reads.

    Raises SurgError (SURG040) for nodes that have no form in Python: calls of submodules and of graph-valued operators.
    """
    if node.op == "call_module" and "function" in node.meta:  # a function of step.py, given to what calls it
        name, callee, options = node.meta["function"]
        return _Writer(argument).call(callee, [Text(name), *node.args], options)
    if node.op not in ("call_function", "call_method") or isinstance(node.target, HigherOrderOperator):
        raise fail("SURG040", f"the captured graph holds `{node.format_node()}`, which cannot be written as Python")
    writer = _Writer(argument)
    if isinstance(node.target, str):
        return writer.method(node.target, node.args, dict(node.kwargs))
    if isinstance(node.target, OpOverload):
        return writer.aten(node)
    return writer.plain(node)


def literal(value: Any) -> str:
    """Python source of a constant: numbers, types, devices (the name `device`) and nested lists of them."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(literal(entry) for entry in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    if value is Ellipsis:
        return "..."
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise fail("SURG040", f"the captured graph holds the size {value} that no node computes")
    return repr(value)


class _Writer:
    def __init__(self, argument: Argument) -> None:
        self.argument = argument

    def value(self, value: Any, precedence: int = 0) -> str:
        """The text of an argument, in parentheses if it binds less tightly than its place asks."""
        if isinstance(value, fx.Node):
            text = self.argument(value)
            return text.source if text.precedence >= precedence else f"({text.source})"
        if isinstance(value, Text):
            return value.source
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self.value(entry) for entry in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
        if isinstance(value, slice):
            start, stop, step = (
                ("" if part is None else self.value(part)) for part in (value.start, value.stop, value.step)
            )
            return f"{start}:{stop}" + (f":{step}" if step else "")
        if isinstance(value, (int, float)) and value < 0 and precedence > UNARY:
            return f"({literal(value)})"
        return literal(value)

    def call(self, name: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> Text:
        parts = [self.value(argument) for argument in arguments]
        for key, value in keywords.items():
            if not (key in _SILENT and value in _SILENT[key]):
                parts.append(f"{key}={self.value(value)}")
        return Text(f"{name}({', '.join(parts)})")

    def infix(self, sign: str, precedence: int, left: Any, right: Any) -> Text:
        # Comparisons chain in Python, and powers bind from the right, so both their sides are closed.
        stronger = precedence + (precedence in (COMPARISON, POWER))
        return Text(f"{self.value(left, stronger)} {sign} {self.value(right, precedence + 1)}", precedence)

    def method(self, name: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> Text:
        owner = self.value(arguments[0], ATOM)
        return self.call(f"{owner}.{name}", arguments[1:], keywords)

    def index(self, owner: Any, indices: Sequence[Any]) -> Text:
        text = self.value(owner, ATOM)
        return Text(f"{text}[{', '.join(self.value(index) for index in indices)}]")

    def plain(self, node: fx.Node) -> Text:
        """A Python function: operators on sizes, `getitem`, functions of `torch`, `math` and `torch.nn.functional`."""
        target: Any = node.target
        arguments, keywords = node.args, dict(node.kwargs)
        if target in _OPERATORS and len(arguments) == 2 and not keywords:
            return self.infix(*_OPERATORS[target], *arguments)
        if target is operator.getitem:
            keys = arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],)
            return self.index(arguments[0], keys)
        if target is operator.neg:
            return Text(f"-{self.value(arguments[0], UNARY)}", UNARY)
        name = getattr(target, "__name__", "")
        if target is torch.nn.functional.linear and len(arguments) == 3 and arguments[2] is None:
            arguments = arguments[:2]
        if target is torch.nn.functional.pad and keywords == {"mode": "constant", "value": None}:
            keywords = {}
        for prefix, namespace in (("", builtins), ("torch.", torch), ("F.", torch.nn.functional), ("math.", math)):
            if getattr(namespace, name, None) is target:
                return self.call(prefix + name, arguments, keywords)
        for prefix, inner in (("fft", torch.fft), ("linalg", torch.linalg)):  # torch.fft.rfft calls itself fft_rfft
            public = name.removeprefix(f"{prefix}_")
            if getattr(inner, public, None) is target:
                return self.call(f"torch.{prefix}.{public}", arguments, keywords)
        module = getattr(target, "__module__", None) or ""
        if module.startswith("surgery.compiler.kernels."):  # step.py imports it
            return self.call(name, arguments, keywords)
        if getattr(operator, name, None) is target:
            module = "operator"
        if not name or not module:
            raise fail("SURG040", f"the captured graph calls `{target}`, which cannot be written as Python")
        return self.call(f"{module}.{name}", arguments, keywords)

    def aten(self, node: fx.Node) -> Text:
        """An operator of torch: the nicer spelling where it means exactly the same."""
        target: Any = node.target
        namespace, _, full = str(target).partition(".")
        arguments, keywords = list(node.args), dict(node.kwargs)
        if namespace == "aten":
            text = self.special(full, target, arguments, keywords)
            if text is not None:
                return text
        return self.call(f"torch.ops.{namespace}.{full}", arguments, keywords)

    def special(self, full: str, target: OpOverload, arguments: list[Any], keywords: dict[str, Any]) -> Text | None:
        name = full.partition(".")[0]
        if full in _INFIX and len(arguments) == 2 and not keywords and isinstance(arguments[0], fx.Node):
            return self.infix(*_INFIX[full], *arguments)
        if full == "rsub.Scalar" and len(arguments) == 2:
            return self.infix("-", SUM, arguments[1], arguments[0])
        if full in ("min.other", "max.other"):
            return self.call(f"torch.{name}", arguments, keywords)
        if full == "neg.default":
            return Text(f"-{self.value(arguments[0], UNARY)}", UNARY)
        if full == "bitwise_not.default":
            return Text(f"~{self.value(arguments[0], UNARY)}", UNARY)
        if full == "sym_size.int":
            return Text(f"{self.value(arguments[0], ATOM)}.shape[{self.value(arguments[1])}]")
        if full in ("slice.Tensor", "select.int"):
            return self.part(full, arguments, keywords)
        if full == "index.Tensor" and not any(_is_number(index) for index in arguments[1]):
            return self.index(arguments[0], [slice(None) if index is None else index for index in arguments[1]])
        if full == "embedding.default":
            return self.embedding(arguments, keywords)
        if full == "to.dtype_layout":
            return self.method("to", arguments, dict(reversed(keywords.items())))
        named = _by_name(target, arguments, keywords)
        if name in _FUNCTIONAL and _fits(name, full):
            return self.call(f"F.{name}", *named)
        if full in _METHODS:
            if name in ("view", "reshape", "permute", "expand", "repeat") and isinstance(arguments[1], (list, tuple)):
                return self.method(name, [arguments[0], *arguments[1]] if arguments[1] else arguments, keywords)
            if name in ("mean", "sum", "amax", "amin") and len(named[0]) > 1 and len(named[0][1] or ()) == 1:
                named[0][1] = named[0][1][0]  # x.mean(-1) is x.mean([-1])
            return self.method(name, *named)
        if name in _TORCH and full != "round.decimals":
            return self.call(f"torch.{name}", *named)
        return None

    def part(self, full: str, arguments: list[Any], keywords: dict[str, Any]) -> Text | None:
        """`x[:, 2:4]` for a slice and `x[:, 0]` for a selection, along a known axis counted from the front."""
        if keywords or len(arguments) < 2 or not isinstance(arguments[1], int) or arguments[1] not in range(6):
            return None
        leading = [slice(None)] * arguments[1]
        if full == "select.int":
            return self.index(arguments[0], [*leading, arguments[2]])
        given = arguments[2:]
        default: list[Any] = [None, None, 1]
        start, end, step = given + default[len(given) :]
        if step != 1:
            return None
        begin = None if isinstance(start, int) and start == 0 else start
        return self.index(arguments[0], [*leading, slice(begin, None if isinstance(end, int) and end == _END else end)])

    def embedding(self, arguments: list[Any], keywords: dict[str, Any]) -> Text | None:
        """`F.embedding`, which takes the numbers first; it says "no padding" where aten says -1."""
        if keywords or len(arguments) > 3:
            return None
        padding = arguments[2] if len(arguments) == 3 else -1
        weight, numbers = self.value(arguments[0]), self.value(arguments[1])
        return Text(f"F.embedding({numbers}, {weight}" + (f", padding_idx={padding})" if padding != -1 else ")"))


# Positional arguments of a call beyond these are written with their names.
_POSITIONAL = {
    "scaled_dot_product_attention": 3,
    "layer_norm": 2,
    "mean": 2,
    "sum": 2,
    "amax": 2,
    "amin": 2,
    "dropout": 3,
    "group_norm": 2,
}


def _by_name(target: OpOverload, arguments: list[Any], keywords: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional arguments that no one knows by heart become keyword arguments; aten and torch name these alike."""
    name = str(target).split(".")[1]
    limit = _POSITIONAL.get(name)
    if limit is None or len(arguments) <= limit:
        return arguments, keywords
    names = [argument.name for argument in target._schema.arguments]
    extra = dict(list(zip(names, arguments, strict=False))[limit:])
    for own in ("cudnn_enable", "cudnn_enabled"):  # F.layer_norm and F.group_norm set it themselves
        extra.pop(own, None)
    return arguments[:limit], {**extra, **keywords}


def _is_number(index: fx.Node | None) -> bool:
    """Whether an index is a tensor without axes, which Python's brackets would read as a plain number."""
    return index is not None and getattr(index.meta.get("val"), "ndim", 1) == 0


def _fits(name: str, full: str) -> bool:
    """Whether the overload is the one that `torch.nn.functional` calls with the same arguments in the same order."""
    if name in ("pad", "one_hot", "dropout", "linear", "layer_norm", "scaled_dot_product_attention"):
        return full == f"{name}.default"
    return full in (f"{name}.default", f"{name}.padding")
