"""A product with a matrix in few bits: against the library's own numbers, and against the dense product with them."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from surgery.compiler.kernels.quantized_linear import (
    BLOCK,
    dequantized,
    layout,
    quantized,
    quantized_linear,
    stored_bytes,
    workspace,
)

library: Any = bitsandbytes.functional
KINDS = ("nf4", "int8")
# Rows that blocks end with, blocks that reach over rows, a last block that is not full, one that nothing fills.
SHAPES = [(16, 128), (24, 48), (7, 130), (1, 2), (96, 80)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(weight: Tensor, scale: Tensor) -> Tensor:
    """What codes and scales stand for, in float64 from the library's table of levels."""
    if weight.dtype == torch.int8:
        return weight.double() * scale.double()[:, None]
    levels = library.get_4bit_type("nf4", device="cpu").double()
    nibbles = torch.stack([weight >> 4, weight & 15], -1).flatten().long()
    found: Tensor = levels[nibbles] * scale.double().repeat_interleave(BLOCK)[: nibbles.numel()]
    return found.view(len(weight), -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_matrix_is_what_its_codes_stand_for(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, scale = quantized(drawn(*shape, dtype=dtype), kind)
    codes, code_dtype, scales = layout(kind, *shape)
    assert (tuple(weight.shape), weight.dtype, tuple(scale.shape)) == (codes, code_dtype, scales)
    assert weight.numel() * weight.element_size() + 4 * scale.numel() == stored_bytes(kind, *shape)
    found, meant = dequantized(weight, scale, dtype), exact(weight, scale)
    assert found.dtype == dtype and found.shape == torch.Size(shape)
    unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found.double(), meant, rtol=2 * unit, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_half_a_step_between_levels(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = drawn(*shape, dtype=dtype)
    levels = library.get_4bit_type("nf4", device="cpu").double().sort().values
    weight, scale = quantized(matrix, "nf4")
    largest = scale.double().repeat_interleave(BLOCK)[: matrix.numel()].view(shape)
    off = (exact(weight, scale) - matrix.double()).abs() / largest
    assert float(off.max()) <= float(levels.diff().max()) / 2 + 1e-6  # the widest gap is below -0.69
    weight, scale = quantized(matrix, "int8")
    rounded = matrix.half().double()  # what the library quantizes
    assert float(((exact(weight, scale) - rounded).abs() / scale.double()[:, None]).max()) <= 0.5 + 1e-4


def test_it_is_what_the_library_makes_of_the_same_matrix() -> None:
    """Of the sizes that its own dequantization gets right on a CPU: rows of whole blocks."""
    matrix = drawn(16, 128)
    weight, scale = quantized(matrix, "nf4")
    codes, state = library.quantize_4bit(matrix, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(codes.view_as(weight), weight) and torch.equal(state.absmax, scale)
    assert torch.equal(library.dequantize_4bit(codes, state), dequantized(weight, scale, torch.float32))
    weight, scale = quantized(matrix, "int8")
    codes, stats, _ = library.int8_vectorwise_quant(matrix.half())
    assert torch.equal(codes, weight)
    theirs = library.int8_vectorwise_dequant(codes, stats)
    torch.testing.assert_close(dequantized(weight, scale, torch.float32), theirs, rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_of_zeros_stays_one(kind: str) -> None:
    matrix = drawn(4, 128)
    matrix[1] = 0
    assert torch.equal(dequantized(*quantized(matrix, kind), torch.float32)[1], matrix[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("leading", [(7,), (2, 3)], ids=str)
def test_product_and_gradients_are_those_with_the_dense_matrix(
    kind: str, dtype: torch.dtype, transposed: bool, leading: tuple[int, ...]
) -> None:
    weight, scale = quantized(drawn(24, 48, dtype=dtype), kind)
    matrix = dequantized(weight, scale, dtype)
    rows, columns = (48, 24) if transposed else (24, 48)

    def results(run: Any) -> list[Any]:
        x = drawn(*leading, columns, seed=1, dtype=dtype).requires_grad_()
        bias = drawn(rows, seed=2, dtype=dtype).requires_grad_()
        y = run(torch.tanh(x), bias)
        torch.autograd.backward(y, drawn(*leading, rows, seed=3, dtype=dtype))
        return [y, x.grad, bias.grad]

    dense = results(lambda x, bias: functional.linear(x, matrix.T if transposed else matrix, bias))
    for ours, theirs in zip(
        results(lambda x, bias: quantized_linear(x, weight, scale, bias, transposed)), dense, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_any_order(kind: str) -> None:
    weight, scale = quantized(drawn(6, 8), kind)
    x = drawn(3, 8, seed=1, dtype=torch.float64).requires_grad_()
    bias = drawn(6, seed=2, dtype=torch.float64).requires_grad_()
    run = lambda x, bias: quantized_linear(x, weight, scale, bias).sin()  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, bias))
    assert torch.autograd.gradgradcheck(run, (x, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dense_is_kept_for_the_backward(kind: str) -> None:
    weight, scale = quantized(drawn(24, 48), kind)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        quantized_linear(drawn(5, 48).requires_grad_(), weight, scale)
    assert {tensor.data_ptr() for tensor in kept} == {weight.data_ptr(), scale.data_ptr()}
    assert workspace(drawn(5, 48), weight) == 24 * 48 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_without_a_graph_break(kind: str) -> None:
    weight, scale = quantized(drawn(24, 48), kind)
    x, bias = drawn(7, 48, seed=1).requires_grad_(), drawn(24, seed=2)

    def run(x: Tensor) -> Tensor:
        return quantized_linear(torch.tanh(x), weight, scale, bias).square().sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    (ours,), (theirs,) = (torch.autograd.grad(function(x), x) for function in (compiled, run))
    assert torch.equal(ours, theirs)


def test_autocast_runs_it_in_its_dtype() -> None:
    weight, scale = quantized(drawn(24, 48), "nf4")
    x = drawn(5, 48, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized_linear(x, weight, scale)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, quantized_linear(x.to(torch.bfloat16), weight, scale))


def test_transforms_of_torch_func_see_its_definition() -> None:
    weight, scale = quantized(drawn(6, 8), "int8")
    x = drawn(3, 8, seed=1)
    jacobian: Any = torch.func.jacrev(lambda row: quantized_linear(row, weight, scale))(x[0])
    torch.testing.assert_close(jacobian, dequantized(weight, scale, torch.float32))


def test_scales_of_another_dtype_are_refused() -> None:
    weight, scale = quantized(drawn(6, 8), "int8")
    with pytest.raises(TypeError, match="float32"):
        quantized_linear(drawn(3, 8), weight, scale.to(torch.bfloat16))
