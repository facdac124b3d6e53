"""Attention on a CUDA device: which kernels shared keys take, and documents in rows by flex attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.compiler.kernels.packed_attention import document_starts, packed_attention, packed_attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MATH = 0  # torch's number of the plain product


def inputs(dtype: torch.dtype, rows: int, heads: int, groups: int, length: int, size: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(rows, length, count, size, device="cuda", dtype=dtype).transpose(1, 2).detach().requires_grad_()
        for count in (heads, groups, groups)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_shared_keys_have_a_kernel(dtype: torch.dtype, size: int, causal: bool, dropout: float) -> None:
    """What compiler/optimize/attention.py takes for granted."""
    query, key, value = inputs(dtype, 2, 8, 2, 512, size)
    choice = torch._fused_sdp_choice(query, key, value, None, dropout, causal, enable_gqa=True)
    assert choice != MATH


def positions(rows: int, length: int, documents: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    made = []
    for _ in range(rows):
        cuts = sorted((torch.randperm(length - 1, generator=generator)[: documents - 1] + 1).tolist())
        bounds = [0, *cuts, length]
        made.append(torch.cat([torch.arange(end - start) for start, end in zip(bounds, bounds[1:], strict=False)]))
    return torch.stack(made).cuda()


CASES = [
    (torch.bfloat16, 64, 2, 8, 2, 512, 4),
    (torch.bfloat16, 64, 2, 8, 2, 1000, 7),
    (torch.bfloat16, 64, 3, 8, 2, 77, 3),
    (torch.bfloat16, 64, 1, 8, 8, 640, 1),
    (torch.bfloat16, 64, 2, 14, 2, 300, 30),
    (torch.bfloat16, 64, 2, 8, 2, 5, 2),
    (torch.float16, 128, 2, 8, 2, 777, 4),
    (torch.bfloat16, 256, 1, 4, 1, 512, 3),
    (torch.bfloat16, 80, 2, 4, 4, 300, 3),
    (torch.float32, 64, 2, 8, 2, 300, 3),
]


@pytest.mark.parametrize("case", CASES)
def test_documents_against_float64(case: tuple[Any, ...]) -> None:
    dtype, size, rows, heads, groups, length, documents = case
    given = inputs(dtype, rows, heads, groups, length, size)
    starts = document_starts(positions(rows, length, documents))
    gradient = torch.randn_like(given[0])

    def of(attention: Any, given: list[Tensor]) -> list[Tensor]:
        output = attention(*given, starts)
        return [output, *torch.autograd.grad(output, given, gradient.to(output.dtype))]

    exact = of(packed_attention_reference, [tensor.detach().double().requires_grad_() for tensor in given])
    torch.full_like(given[0], float("nan"))
    ours, dense = of(packed_attention, given), of(packed_attention_reference, given)
    for truth, theirs, found in zip(exact, dense, ours, strict=True):
        assert found.dtype == dtype
        assert (found.double() - truth).norm() <= 2 * (theirs.double() - truth).norm() + 1e-6 * truth.norm()


def test_documents_without_a_wait_or_a_dense_mask() -> None:
    query, key, value = given = inputs(torch.bfloat16, 1, 8, 2, 8192, 64)
    starts = document_starts(positions(1, 8192, 9))
    torch.autograd.grad(packed_attention(query, key, value, starts).sum(), given)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(packed_attention(query, key, value, starts).sum(), given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 8192 * 8192  # one byte for each two tokens


@pytest.mark.parametrize("dynamic", [False, True])
def test_documents_inside_a_compiled_block(dynamic: bool) -> None:
    torch.manual_seed(0)
    width = 256
    # As in a step: parameters, and the size of a head as a number, are fixed where the rows vary.
    weights: dict[str, Tensor] = {
        name: nn.Parameter((torch.randn(outputs, inputs, device="cuda") * 0.05).bfloat16(), requires_grad=False)
        for name, outputs, inputs in (("q", 512, width), ("k", 128, width), ("v", 128, width), ("o", width, 512))
    }

    def block(w: dict[str, Tensor], x: Tensor, starts: Tensor) -> Tensor:
        rows, length, _ = x.shape
        query, key, value = (functional.linear(x, w[name]).view(rows, length, -1, 64).transpose(1, 2) for name in "qkv")
        attended = packed_attention(query, key, value, starts, 0.125)
        return x + functional.linear(attended.transpose(1, 2).reshape(rows, length, -1), w["o"])

    compiled = torch.compile(block, dynamic=dynamic, fullgraph=True)
    for length in (300, 512) if dynamic else (300,):
        x = torch.randn(2, length, width, device="cuda").bfloat16().requires_grad_()
        starts = document_starts(positions(2, length, 3))
        ours, theirs = compiled(weights, x, starts), block(weights, x, starts)
        for found, expected in (
            (ours, theirs),
            *zip(*(torch.autograd.grad(y.sum(), x) for y in (ours, theirs)), strict=True),
        ):
            assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_a_step_on_rows_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import surgery
    from surgery.compiler import p8_optimize
    from surgery.compiler.optimize.packed_rows import pack_rows

    config = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config)
    model.to("cuda", torch.bfloat16)
    inputs = {"input_ids": torch.randint(0, 97, (2, 300)).cuda(), "position_ids": positions(2, 300, 4)}
    program = surgery.parse("""
        adapt model.layers.*.self_attn.*_proj { with lora(rank = 4) }
        step { optimizer = adamw(lr = 1e-2)  batch = 2  steps = 4  loss = causal_lm  compile = off }
    """)
    plain = surgery.compile(program, model=model, example_inputs=inputs)
    optimizations = {pack_rows: "attentions within documents", **p8_optimize.OPTIMIZATIONS}
    monkeypatch.setattr(p8_optimize, "OPTIMIZATIONS", optimizations)
    packed = surgery.compile(program, model=model, example_inputs=inputs)
    assert "packed_attention(" in packed.source
    for _ in range(3):
        batch = {**inputs, "labels": inputs["input_ids"]}
        torch.testing.assert_close(packed(batch).loss, plain(batch).loss, rtol=1e-2, atol=0.0)
