"""Local names in emitted code: from the module that ran, else from the operation; unique within a function."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable

import torch
from torch import fx

from surgery.compiler.emit.imports import IMPORTS

RESERVED = frozenset(
    {
        "w",
        "weights",
        "torch",
        "F",
        "math",
        "device",
        "training",
        "forward",
        "block",
        "blocks",
        "part",
        "batch",
        "length",
    }
    | {"step", "steps", "optimizer", "loss", "events", "under", "index", "gradients", "train_step", *IMPORTS}
)
_OF_A_STEP = """
    add_products binary_loss chunked_loss class_outputs compile_forward compiled cosine_up cross_entropy_count
    cross_entropy_loss cubic_budget forget gradient head head_weights hidden_states keep keep_top keeping_less
    label_outputs late_budget learn like_the_others main make_optimizer mse_count mse_loss next_token_count
    next_token_loss next_token_targets number_outputs output_count output_loss over_processes penalty put_back quantile
    redraw rest rounds_of_others schedule step_over_processes token_outputs without_padding
"""
OF_A_STEP = RESERVED | set(_OF_A_STEP.split())  # what step.py defines or imports beside functions of the model's blocks
_WORDS = {
    "add": "total", "sub": "difference", "rsub": "difference", "mul": "product", "div": "quotient", "pow": "power",
    "rsqrt": "inverse_root", "matmul": "product", "bmm": "product", "mm": "product", "scaled_dot_product_attention":
    "attended", "softmax": "shares", "cat": "joined", "stack": "stacked", "neg": "negative", "arange": "positions",
    "eq": "equal", "ne": "different", "le": "at_most", "lt": "less", "gt": "more", "ge": "at_least", "index":
    "picked", "where": "chosen", "embedding": "embedded", "dropout": "dropped", "cumsum": "running_sum", "diff":
    "differences", "sym_size": "size", "sum": "summed", "abs": "magnitude", "max": "largest", "min": "smallest",
    "__and__": "both", "__or__": "either", "bitwise_not": "inverted", "logical_not": "inverted", "gather":
    "gathered", "masked_fill": "masked", "linear": "projected", "layer_norm": "normalised", "batch_norm":
    "normalised", "addmm": "projected", "mean": "mean", "log": "logarithm", "floordiv": "quotient", "round":
    "rounded", "split": "parts", "chunk": "parts", "document_starts": "starts", "packed_attention": "attended",
    "from_diagonals": "matrix", "updated_row_norms": "norms", "scaled_columns": "scaled", "added_linear": "adapted",
    "truediv": "quotient",
}  # fmt: skip
_SHAPED = {
    "view": "reshaped", "reshape": "reshaped", "transpose": "transposed", "permute": "permuted", "expand":
    "expanded", "unsqueeze": "unsqueezed", "squeeze": "squeezed", "contiguous": "contiguous", "slice": "part",
    "select": "part", "flatten": "flat", "to": "cast", "repeat": "repeated", "clone": "copy", "detach": "detached",
    "getitem": "part", "unbind": "parts", "t": "transposed",
}  # fmt: skip
_SUFFIXES = re.compile(
    "_(heads|" + "|".join(sorted(set(_SHAPED.values()) | {r"float32|bfloat16|float16|bool|int64"})) + ")(_\\d+)?$"
)


def snake(name: str) -> str:
    """`LlamaDecoderLayer` to `llama_decoder_layer`, `SelfAttention` to `self_attention`; always an identifier."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    name = re.sub(r"\W+", "_", name).strip("_") or "value"
    return f"_{name}" if name[0].isdigit() else name


class Names:
    """Hands out unused names; those in `taken` belong to others."""

    def __init__(self, taken: frozenset[str] = frozenset()) -> None:
        self.used = set(RESERVED | taken)

    def claim(self, wanted: str) -> str:
        """`wanted`, or `wanted_2`, `wanted_3`... if it is in use."""
        wanted = f"{wanted}_" if keyword.iskeyword(wanted) or hasattr(builtins, wanted) else wanted
        name, number = wanted, 1
        while name in self.used:
            number += 1
            name = f"{wanted}_{number}"
        self.used.add(name)
        return name

    @staticmethod
    def next_of(wanted: str, used: Iterable[str]) -> str:
        """`wanted`, or it with the first number that is not among `used`."""
        taken, name, number = set(used), wanted, 1
        while name in taken:
            number += 1
            name = f"{wanted}_{number}"
        return name


def operation(node: fx.Node) -> str:
    """The bare name of what a node calls: `add`, `linear`, `getitem`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).split(".")[1]
    return str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]


def by_operation(node: fx.Node, base: str | None) -> str:
    """A name from what is done: shape changes keep the name of what they change (`base`)."""
    name = operation(node)
    if name in _SHAPED and base is not None:
        stem = _SUFFIXES.sub("", base)
        value = node.meta.get("val")
        if name == "to":
            kind = value.dtype if isinstance(value, torch.Tensor) else torch.float32
            return f"{stem}_{str(kind).removeprefix('torch.')}"
        if isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point():
            return f"{stem}_heads"
        return f"{stem}_{_SHAPED[name]}"
    if name == "add" and is_skip(node):
        return "residual"
    return _WORDS.get(name, snake(name))


def by_factor(node: fx.Node) -> str | None:
    """`base` for a product with the module's own weight, `times_A` for one with a method's tensor, else None."""
    while operation(node) == "mul" and len(node.all_input_nodes) == 1:  # scaled by a number
        node = node.all_input_nodes[0]
    if operation(node) not in ("linear", "matmul") or not isinstance(node.args[1], fx.Node):
        return None
    factor = node.args[1]
    while len(factor.all_input_nodes) == 1:  # cast, transposed, scaled
        factor = factor.all_input_nodes[0]
    if factor.op != "get_attr":
        return None
    name = str(factor.target).rpartition(".")[2]
    return "base" if name == "weight" else f"times_{name}"


def is_skip(node: fx.Node) -> bool:
    """Whether an addition joins two activations of the same shape, as residual connections do."""
    values = [argument.meta.get("val") for argument in node.args[:2] if isinstance(argument, fx.Node)]
    if len(values) < 2 or not all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values):
        return False
    return all(value.ndim == 3 for value in values if isinstance(value, torch.Tensor)) and not any(
        isinstance(argument, fx.Node) and argument.op == "get_attr" for argument in node.args
    )


_PLAIN = {
    "to",
    "expand",
    "unsqueeze",
    "contiguous",
    "view",
    "reshape",
    "slice",
    "mul",
    "detach",
    "clone",
    "transpose",
    "permute",
}


def describe(node: fx.Node) -> str:
    """A name for a value that all blocks read: a mask, or what its last telling operation makes of it."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.ndim >= 3 and value.dtype == torch.bool:
        return "mask"
    while operation(node) in _PLAIN and isinstance(node.args[0], fx.Node) and node.args[0].op == "call_function":
        node = node.args[0]
    if operation(node) == "where":
        return "mask"
    return by_operation(node, None)
