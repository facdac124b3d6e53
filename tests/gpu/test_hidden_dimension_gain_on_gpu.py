"""Dimensions that are measured on a CUDA device: those of the CPU; by `make gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import surgery

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def llama(device: str) -> Any:
    """Three layers with random weights, whose attention is not near uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)


def rows(device: str) -> list[dict[str, Tensor]]:
    """900 rows of 5 to 24 tokens, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 96, (900, 24), generator=generator)
    mask = (torch.arange(24) < torch.randint(5, 25, (900, 1), generator=generator)).long()
    whole = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    return [{name: value[start : start + 64] for name, value in whole.items()} for start in range(0, 900, 64)]


@pytest.mark.parametrize("estimator", ["regression", "likelihood"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_device_measures_what_the_cpu_does(pooling: str, estimator: str) -> None:
    blocks = "[0..2]" if pooling == "mean" else "[1..2]"  # at most 96 embeddings end the rows
    call = f'hidden_dimension_gain(pooling = "{pooling}", estimator = "{estimator}")'
    program = surgery.parse(f"adapt model.layers.{blocks}.self_attn.q_proj {{ with lora(rank = {call}) }}")
    here, there = (
        surgery.plan(program, llama(device), calibration=rows(device)).measured[0] for device in ("cpu", "cuda")
    )
    assert here.rows == there.rows == 900
    for path, dimensions in here.blocks.items():
        assert there.blocks[path] == pytest.approx(dimensions, rel=1e-3)
