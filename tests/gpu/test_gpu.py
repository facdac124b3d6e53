"""What has to hold on a CUDA device; run by `make gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import surgery

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 6


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two layers with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
    )
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def batches(device: str) -> list[dict[str, Tensor]]:
    """One batch per step."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 96, (4, 24), generator=generator).to(device) for _ in range(STEPS)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in tokens]


def step_on(
    device: str, method: str, options: str = "", compiled: str = "off", dtype: torch.dtype = torch.float32
) -> Any:
    """The program's step on a device."""
    program = surgery.parse(f"""
        adapt model.layers.*.{{self_attn,mlp}}.*_proj {{ with {method}  {options} }}
        step {{ optimizer = adamw(lr = 1e-2)  batch = 4  steps = {STEPS}  loss = causal_lm  compile = {compiled} }}
    """)
    example = {"input_ids": batches(device)[0]["input_ids"]}
    return surgery.compile(program, model=llama(dtype).to(device), example_inputs=example, device=device)


def losses(step: Any, device: str) -> list[float]:
    """Losses of a short run."""
    return [float(step(batch).loss) for batch in batches(device)]


@pytest.fixture(autouse=True)
def full_precision() -> None:
    torch.set_float32_matmul_precision("highest")


METHODS = [
    ("lora(rank = 4)", ""),
    ("dora(rank = 4)", ""),
    ("delta_lora(rank = 4, start = 1)", "update = literal"),
    ("delta_lora(rank = 4, start = 1)", "update = telescope"),
]


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_the_device_agrees_with_the_cpu(method: str, options: str) -> None:
    here, there = step_on("cpu", method, options), step_on("cuda", method, options)
    for path, tensors in here.parameters_by_site.items():  # starts are drawn on the CPU, whatever the device
        for name, tensor in tensors.items():
            other = there.parameters_by_site[path][name]
            assert other.is_cuda
            torch.testing.assert_close(other.cpu(), tensor, rtol=1e-6, atol=1e-6)
    assert losses(there, "cuda") == pytest.approx(losses(here, "cpu"), rel=1e-4)
    for path in here.parameters_by_site:
        torch.testing.assert_close(
            there.effective_weight(path).cpu(), here.effective_weight(path), rtol=1e-2, atol=1e-3
        )


def test_the_literal_update_changes_the_weight_on_the_device() -> None:
    step = step_on("cuda", "delta_lora(rank = 4, ratio = 2.0, start = 1)", "update = literal")
    path = next(iter(step.parameters_by_site))
    name = f"{path}.weight"
    start, address = step.weights[name].clone(), step.weights[name].data_ptr()
    moved = []
    for batch in batches("cuda"):
        before = step.weights[name].clone()
        step(batch)
        moved.append(not torch.equal(before, step.weights[name]))
    assert moved == [number > 1 for number in range(STEPS)]
    assert step.weights[name].is_cuda and step.weights[name].data_ptr() == address  # in place, not a new tensor
    change = (step.weights[name] - start).double()
    assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 8  # two factors of rank 4: the sum telescopes


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_compiled_equals_eager(method: str, options: str) -> None:
    eager, compiled = step_on("cuda", method, options), step_on("cuda", method, options, compiled="on")
    assert losses(compiled, "cuda") == pytest.approx(losses(eager, "cuda"), rel=1e-3)


@pytest.mark.parametrize("update", ["telescope", "literal"])
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_bfloat16_trains_and_repeats(compiled: str, update: str) -> None:
    def made() -> Any:
        options = f"update = {update}"
        return step_on("cuda", "delta_lora(rank = 4, start = 1)", options, compiled=compiled, dtype=torch.bfloat16)

    assert losses(made(), "cuda") == losses(made(), "cuda")
    same = batches("cuda")[0]
    step = made()
    falling = [float(step(same).loss) for _ in range(STEPS)]
    assert falling[-1] < falling[0]


def test_a_bfloat16_weight_is_its_sum_rounded_once() -> None:
    step = step_on("cuda", "delta_lora(rank = 4, ratio = 2.0, start = 1)", "update = literal", dtype=torch.bfloat16)
    losses(step, "cuda")
    for path, tensors in step.parameters_by_site.items():
        start, now = step.weights[f"{path}.weight.start"].double(), step.weights[f"{path}.weight"].double()
        last, first = (tensors[f"B{s}"].double() @ tensors[f"A{s}"].double() for s in ("", "_start"))
        assert not torch.equal(start, now)
        change = 2.0 * (last - first)
        products = 2e-3 * float(change.abs().max())  # what tensor cores leave of float32 factors
        torch.testing.assert_close(now, start + change, rtol=1.01 * 2**-8, atol=products)
