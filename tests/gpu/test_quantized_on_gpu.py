"""A quantized base on a CUDA device in bfloat16, against dense products with what its codes stand for; `make gpu`."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import surgery
from surgery.compiler.kernels.quantized_linear import dequantized, quantized, quantized_linear, stored_bytes
from surgery.compiler.memory import predicted
from surgery.runtime.quantize import dense_model, quantized_copy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, the extra `quantize`")

DEVICE = "cuda"
KINDS = ("nf4", "int8")
SHAPES = [(256, 192), (96, 80), (7, 130), (2048, 512)]
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def llama(**settings: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **settings})  # type: ignore[arg-type]
    return LlamaForCausalLM(config).to(DEVICE, torch.bfloat16).eval()  # type: ignore[arg-type]


def program(kind: str | None, compiled: str = "off", method: str = "lora(rank = 8, alpha = 16)") -> Any:
    setting = "" if kind is None else f"quantize = {kind}"
    return surgery.parse(f"""
        model "given" {{ task = causal_lm  {setting} }}
        adapt model.layers.*.{{self_attn,mlp}}.*_proj {{ with {method} }}
        step {{ optimizer = adamw(lr = 1e-3)  batch = 4  steps = 9  compile = {compiled} }}
    """)


def batch(rows: int = 4, length: int = 64) -> dict[str, Tensor]:
    ids = torch.randint(3, 512, (rows, length), generator=torch.Generator().manual_seed(length)).to(DEVICE)
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_are_those_of_a_cpu_and_stand_for_the_same(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs, ours = quantized(matrix, kind), quantized(matrix.to(DEVICE), kind)
    held = [tensor.cpu() for tensor in ours]
    assert [tensor.shape for tensor in held] == [tensor.shape for tensor in theirs]
    torch.testing.assert_close(held[1], theirs[1])
    # A number halfway between two levels may go either way.
    assert float((held[0] != theirs[0]).double().mean()) < 1e-3
    found, meant = dequantized(*ours, dtype).cpu().double(), dequantized(held[0], held[1], torch.float32).double()
    torch.testing.assert_close(found, meant, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert sum(tensor.untyped_storage().nbytes() for tensor in ours) == stored_bytes(kind, *shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_product_and_gradient_are_those_with_the_dense_matrix(kind: str, dtype: torch.dtype) -> None:
    weight, scale = quantized(torch.randn(256, 192, device=DEVICE, dtype=dtype), kind)
    matrix = dequantized(weight, scale, dtype).double()
    x = torch.randn(5, 77, 192, device=DEVICE, dtype=dtype, requires_grad=True)
    bias = torch.randn(256, device=DEVICE, dtype=dtype)
    y = quantized_linear(x, weight, scale, bias)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    for found, meant in (
        (y, functional.linear(x.detach().double(), matrix, bias.double())),
        (dx, dy.double() @ matrix),
    ):
        assert float((found.detach().double() - meant).norm() / meant.norm()) < (
            4e-3 if dtype == torch.bfloat16 else 1e-3
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_losses_are_those_of_a_dense_model(kind: str, compiled: str) -> None:
    model = llama()
    step = surgery.compile(program(kind, compiled), model=model)
    dense = dense_model(quantized_copy(model, step.plan))
    other = surgery.compile(program(None), model=dense)
    for number in range(5):
        ours, theirs = (float(run(batch(4, 60 + number)).loss) for run in (step, other))
        assert ours == pytest.approx(theirs, rel=5e-3)  # products are summed in other orders, in bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_module_scope_are_those_of_a_dense_model(kind: str) -> None:
    model = llama()
    step = surgery.compile(program(kind), model=model)
    dense = surgery.apply(program(None), dense_model(quantized_copy(model, step.plan)))
    applied = surgery.apply(program(kind), model)
    found = []
    for one in (applied, dense):
        with torch.no_grad():
            generator = torch.Generator(DEVICE).manual_seed(1)
            for parameter in one.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, device=DEVICE))
        torch.autograd.backward(one(**batch()).loss)
        found.append([parameter.grad for parameter in one.parameters() if parameter.requires_grad])
    assert len(found[0]) == len(found[1]) == 42
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 5e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_takes_the_bytes_that_the_plan_says(kind: str) -> None:
    """Wide enough for the weights to outweigh what a step keeps beside them."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8}
    peaks = []
    for setting in (kind, None):
        model = llama(**sizes).cpu()
        gc.collect()  # what is left of the step before would be freed in between
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        step = surgery.compile(program(setting), model=model, device=DEVICE)
        held = torch.cuda.memory_allocated() - before
        step(batch(4, 32))
        step(batch(4, 32))
        torch.cuda.reset_peak_memory_stats()
        step(batch(4, 32))
        peak, expected = torch.cuda.max_memory_allocated() - before, predicted(step, 32)
        assert peak == pytest.approx(expected.peak, rel=0.1, abs=8 << 20)
        peaks.append((held, peak, step.plan.quantized))
        del step
    (held, _, found), (dense, _, _) = peaks
    assert found is not None
    assert dense - held == pytest.approx(found.dense_bytes - found.bytes, rel=0.02)


def test_a_run_repeats_and_resumes_to_the_bit(tmp_path: Any) -> None:
    step = surgery.compile(program("nf4"), model=llama())
    for _ in range(2):
        step(batch())
    step.save(tmp_path / "run")
    expected = [float(step(batch()).loss) for _ in range(3)]
    again = surgery.load(tmp_path / "run", model=llama())
    assert [float(again(batch()).loss) for _ in range(3)] == expected
