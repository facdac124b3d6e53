"""A product with a frozen matrix that is kept in few bits: dequantized for it, forwards and backwards, and let go.

`nf4` (Dettmers et al. 2023, arXiv:2305.14314, section 3): each number is one of the 16 levels of NormalFloat, times the
largest magnitude of its block of 64. `int8` (Dettmers et al. 2022, arXiv:2208.07339, section 2.1): each row has its own
scale, its largest magnitude over 127. Both are stored as bitsandbytes quantizes them.
"""

from __future__ import annotations

import logging
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from surgery.compiler.kernels import forms

BLOCK = 64  # numbers of an nf4 matrix, along its rows, that share a scale
PACKED = 2  # of them in a byte
_LEVELS = 127  # of int8, to each side of zero

_library = torch.library.Library("surgery", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "quantized_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool transposed) -> Tensor"
)


@cache
def load_bitsandbytes() -> None:
    """Import the library, which registers the operations of nf4; raises ImportError where it is not installed."""
    # On a CPU it says that it found no kernel for a single row's product, which is not run here.
    chatter = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        chatter.setLevel(level)


# --- the two forms ----------------------------------------------------------------------------------------------------


def layout(kind: str, outputs: int, inputs: int) -> tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]:
    """The shape and dtype of the codes of a matrix `[outputs, inputs]`, and the shape of its float32 scales."""
    if kind == "int8":
        return (outputs, inputs), torch.int8, (outputs,)
    return (outputs, inputs // PACKED), torch.uint8, (forms.ceil_div(outputs * inputs, BLOCK),)


def stored_bytes(kind: str, outputs: int, inputs: int) -> int:
    """What a matrix takes, its scales included."""
    codes, _, scales = layout(kind, outputs, inputs)
    return prod(codes) + 4 * prod(scales)


def quantized(matrix: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The codes and scales of a floating matrix `[out, in]`, as `layout` has them, on its device.

    Raises ImportError where bitsandbytes is not installed.
    """
    load_bitsandbytes()
    shape = layout(kind, *matrix.shape)[0]
    if kind == "int8":  # the library takes float16 alone
        codes, largest, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(matrix.half())
        return codes, largest / _LEVELS
    given = matrix if matrix.dtype in (torch.float32, *forms.HALF) else matrix.float()
    codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(given.contiguous(), BLOCK, kind, torch.uint8)
    return codes.view(shape), scales


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix `[out, in]` of codes and scales, computed in float32 and rounded once."""
    if scale.dtype != torch.float32:
        raise TypeError(f"the scales of a quantized matrix are float32, not {scale.dtype}")
    if weight.dtype == torch.int8:
        return torch.mul(weight, scale[:, None], out=torch.empty(weight.shape, dtype=dtype, device=weight.device))
    load_bitsandbytes()
    rows, columns = sides(weight)
    known = dtype if dtype in forms.HALF else torch.float32
    # As one long row: on a CPU the library lets blocks begin anew in every row, and quantizes across them.
    flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(weight, scale, BLOCK, "nf4", [rows * columns], known)
    return flat.view(rows, columns).to(dtype)


def sides(weight: Tensor) -> tuple[int, int]:
    """The numbers of rows and columns of the matrix that codes stand for."""
    return weight.shape[0], weight.shape[1] * (1 if weight.dtype == torch.int8 else PACKED)


# --- the product ------------------------------------------------------------------------------------------------------


def quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """`x @ W.T + bias` for x `[..., in]` and the matrix W `[out, in]` of codes and scales; `x @ W` if transposed.

    The product is in x's dtype, under autocast in its own. W is frozen: there are gradients to x and to the bias. Kept
    for the backward are the codes and scales alone.
    """
    if not x.is_floating_point():  # a model may cast its input to the weight's dtype, which is that of codes here
        raise TypeError(f"a quantized matrix is multiplied with floating rows, not with {x.dtype}")
    if dtype := forms.autocast_dtype(x):
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if forms.needs_definition(weight):
        return _forward(x, weight, scale, bias, transposed)
    result: Tensor = torch.ops.surgery.quantized_linear(x, weight, scale, bias, transposed)
    return result


def workspace(x: Tensor, weight: Tensor, *rest: Any) -> int:
    """The bytes that one product takes while it runs beside what it gives: W, dequantized."""
    return prod(sides(weight)) * x.element_size()


def _forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    matrix = dequantized(weight, scale, x.dtype)
    return functional.linear(x, matrix.T if transposed else matrix, bias)


class _QuantizedLinear(torch.autograd.Function):
    """`dx = dy @ W`, which is the same operation over the transposed matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.transposed = transposed
        ctx.save_for_backward(weight, scale)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = torch.ops.surgery.quantized_linear(x, weight, scale, bias, transposed)
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        need_x, *_, need_bias, _ = ctx.needs_input_grad
        dx = torch.ops.surgery.quantized_linear(dy, weight, scale, None, not ctx.transposed) if need_x else None
        return dx, None, None, dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None, None


def _differentiable(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    result: Tensor = _QuantizedLinear.apply(x, weight, scale, bias, transposed)  # type: ignore[no-untyped-call]
    return result


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], sides(weight)[1 if transposed else 0])


_library.impl("quantized_linear", _differentiable, "Autograd")  # type: ignore[no-untyped-call]
_library.impl("quantized_linear", _forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("surgery::quantized_linear", _fake, lib=_library)


@register_flop_formula(torch.ops.surgery.quantized_linear)
def _operations(x: Any, weight: Any, scale: Any, bias: Any, transposed: bool, out_shape: Any = None, **_: Any) -> int:
    """One product, whichever way."""
    return int(2 * prod(x) * out_shape[-1])
