"""Every method of the library on a CUDA device: the losses of the CPU, and compiled those of eager; by `make gpu`."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import surgery
from surgery.compiler.library import library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 4
SMALL = {
    "rank": 4,
    "block": 8,
    "outer": 8,
    "bottleneck": 8,
    "frequencies": 50,
    "groups": 4,
    "factor": 4,
    "start": 1,
    "target": 2,
}
# The first that a method admits: square and not, square alone, norms, the heads of an attention.
PATTERNS = (
    "model.layers.*.{self_attn,mlp}.*_proj",
    "model.layers.*.self_attn.{q,o}_proj",
    "model.layers.*.input_layernorm",
    "model.layers.*.self_attn.{q,k,v}_proj",
    "model.layers.*.self_attn.o_proj",
)
COMPILED = ("circulant", "ldr", "mora", "mora_rotary", "lors", "oft", "surm_adapter", "reslora", "gralora", "pissa")


@functools.cache
def llama() -> nn.Module:
    """Three layers with random weights, as many heads for keys as for queries."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=96, max_position_embeddings=64,
    )  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def batches(device: str) -> list[dict[str, Tensor]]:
    """One batch per step."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 96, (4, 24), generator=generator).to(device) for _ in range(STEPS)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in tokens]


@functools.cache
def program_of(method: str) -> str:
    """A rule with small arguments on the first pattern that the method admits."""
    parameters = library()[method].parameters
    if any(parameter.kind == "text" and parameter.default is None for parameter in parameters):
        pytest.skip(f"{method} needs other checkpoints")
    names = [parameter.name for parameter in parameters]
    arguments = ", ".join(f"{name} = {value}" for name, value in SMALL.items() if name in names)
    refused: Exception | None = None
    for pattern in PATTERNS:
        text = f"""
            adapt {pattern} {{ with {method}({arguments}) }}
            step {{ optimizer = adamw(lr = 5e-3)  batch = 4  steps = {STEPS}  loss = causal_lm  compile = off }}
        """
        try:
            surgery.plan(surgery.parse(text), llama())
        except surgery.SurgError as error:
            refused = error
            continue
        return text
    raise AssertionError(f"no pattern admits {method}") from refused


def step_on(device: str, method: str, compiled: bool = False) -> Any:
    """The program's step on a device."""
    text = program_of(method).replace("compile = off", "compile = on" if compiled else "compile = off")
    example = {"input_ids": batches(device)[0]["input_ids"]}
    model = llama().to(device)
    return surgery.compile(surgery.parse(text), model, example, calibration=batches(device)[:2])


def losses(step: Any, device: str) -> list[float]:
    """Losses of a short run."""
    return [float(step(batch).loss) for batch in batches(device)]


@pytest.fixture(autouse=True)
def full_precision() -> None:
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("method", sorted(library()))
def test_the_device_agrees_with_the_cpu(method: str) -> None:
    here = step_on("cpu", method)
    expected = losses(here, "cpu")
    there = step_on("cuda", method)
    assert all(tensor.is_cuda for tensors in there.parameters_by_site.values() for tensor in tensors.values())
    assert losses(there, "cuda") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", COMPILED)
def test_compiled_equals_eager(method: str) -> None:
    eager = losses(step_on("cuda", method), "cuda")
    assert losses(step_on("cuda", method, compiled=True), "cuda") == pytest.approx(eager, rel=1e-3)
