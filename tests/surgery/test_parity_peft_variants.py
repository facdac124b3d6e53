"""LoRA's relatives, and other weights than Linear's, against peft 0.21."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from torch import Tensor

from tests.surgery.peft_parity import GPT2, LLAMA, VIT, Case, Part, by_name, compare

pytestmark = pytest.mark.usefixtures("captured_once")

ALL = ["query", "key", "value", "output.dense", "intermediate.dense"]
LINEARS = "adapt bert.encoder.layer.** : Linear"
WORDS = "adapt bert.embeddings.word_embeddings"
PATCHES = "adapt vit.embeddings.patch_embeddings.projection"
CONV1D = "adapt transformer.h.*.{attn,mlp}.c_*"
ALL_CONV1D = ["c_attn", "c_proj", "c_fc"]


def lora(layer: Any, part: Part) -> dict[str, Tensor]:
    return {"A": part(layer.lora_A["default"].weight), "B": part(layer.lora_B["default"].weight)}


def corrected(layer: Any, part: Part) -> dict[str, Tensor]:
    # with W as its start left it, in float32: that the starts are equal is tested in test_starts.py
    return {**lora(layer, part), "weight": part(layer.base_layer.weight)}


def convolution(layer: Any, part: Part) -> dict[str, Tensor]:
    # peft's A is a kernel [rank, channels, kh, kw] and its B one of 1 x 1: ours are their matrices
    return {name: tensor.flatten(1) for name, tensor in lora(layer, part).items()}


CASES = {
    "lora_fa": Case(
        f"{LINEARS} {{ with lora_fa(rank = 4, alpha = 8) }}",
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL),
        lora,
    ),
    "pissa": Case(
        f"{LINEARS} {{ with pissa(rank = 4, alpha = 8) }}",
        lambda: peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=ALL),
        corrected,
    ),
    "olora": Case(
        f"{LINEARS} {{ with olora(rank = 4, alpha = 8) }}",
        lambda: peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="olora", target_modules=ALL),
        corrected,
    ),
    "lora_embedding": Case(
        f"{WORDS} {{ with lora(rank = 4, alpha = 8) }}",
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["word_embeddings"]),
        by_name(A="lora_embedding_A", B="lora_embedding_B"),
    ),
    "lora_convolution": Case(
        f"{PATCHES} {{ with lora(rank = 4, alpha = 8) }}",
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["projection"]),
        convolution,
        subject=VIT,
    ),
    # transformers computes this norm in float32
    "ln_tuning_rms": Case(
        "adapt model.layers.*.*layernorm { with ln_tuning() }",
        lambda: peft.LNTuningConfig(target_modules=r".*layernorm"),
        lambda layer, part: {"g": part(layer.ln_tuning_layers["default"].weight) - part(layer.base_layer.weight)},
        1e-5,
        LLAMA,
    ),
    "vera_conv1d": Case(
        f"{CONV1D} {{ with vera(rank = 6) }}",
        lambda: peft.VeraConfig(r=6, target_modules=ALL_CONV1D, fan_in_fan_out=True),
        by_name(A="vera_A", B="vera_B", d="vera_lambda_d", b="vera_lambda_b"),
        subject=GPT2,
    ),
    "hira_conv1d": Case(
        f"{CONV1D} {{ with hira(rank = 4) }}",
        lambda: peft.HiraConfig(r=4, target_modules=ALL_CONV1D, fan_in_fan_out=True),
        by_name(A="hira_A", B="hira_B"),
        subject=GPT2,
    ),
    "ia3_conv1d": Case(
        "adapt transformer.h.*.attn.c_attn { with ia3() } adapt transformer.h.*.mlp.c_proj { with ia3_input() }",
        lambda: peft.IA3Config(
            target_modules=["attn.c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
        lambda layer, part: {"l": part(layer.ia3_l["default"]).flatten()},
        subject=GPT2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_peft(name: str) -> None:
    compare(CASES[name])
