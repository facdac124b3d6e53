"""LoRA on embeddings, convolutions, Conv1D and stacks of experts against peft 0.21: equal tensors, equal results."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import surgery

pytestmark = pytest.mark.usefixtures("captured_once")

RANK, ALPHA = 4, 8


@dataclass(frozen=True)
class Case:
    """A rule, and how peft is told the same."""

    architecture: str
    pattern: str
    config: dict[str, Any] = field(default_factory=dict)


CASES = {
    "embedding": Case("bert", "bert.embeddings.word_embeddings", {"target_modules": ["word_embeddings"]}),
    "convolution": Case("vit", "vit.embeddings.patch_embeddings.projection", {"target_modules": ["projection"]}),
    "conv1d": Case("gpt2", "transformer.h.*.mlp.c_fc", {"target_modules": ["c_fc"], "fan_in_fan_out": True}),
    "experts": Case("qwen3_moe", "model.layers.*.mlp.experts.down_proj",
                    {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
}  # fmt: skip


def factors(wrapped: Any, path: str, name: str) -> dict[str, tuple[torch.nn.Parameter, Any]]:
    """peft's parameters of a site, each with how ours is laid out there."""
    if name == "experts":
        layer = wrapped.base_model.model.get_submodule(path.rpartition(".")[0])
        # peft has one wide pair: rows of A expert by expert, columns of B rank by rank
        return {
            "A": (layer.lora_A["default"].weight, lambda A: A.flatten(0, 1)),
            "B": (layer.lora_B["default"].weight, lambda B: B.movedim(0, -1).flatten(1)),
        }
    layer = wrapped.base_model.model.get_submodule(path)
    if name == "embedding":
        return {
            "A": (layer.lora_embedding_A["default"], lambda A: A),
            "B": (layer.lora_embedding_B["default"], lambda B: B),
        }
    if name == "convolution":
        return {
            "A": (layer.lora_A["default"].weight, lambda A: A.unflatten(1, (3, 8, 8))),
            "B": (layer.lora_B["default"].weight, lambda B: B[..., None, None]),
        }
    return {"A": (layer.lora_A["default"].weight, lambda A: A), "B": (layer.lora_B["default"].weight, lambda B: B)}


@pytest.mark.parametrize("strategy", ["branch", "fold"])
@pytest.mark.parametrize("name", CASES)
def test_lora_equals_peft(name: str, strategy: str, architectures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's grouped product takes no float64; that of transformers does
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *given: False)
    case = CASES[name]
    architecture = architectures[case.architecture]
    model = architecture.model().double()
    inputs = {
        key: value.double() if value.is_floating_point() else value for key, value in architecture.inputs().items()
    }
    wrapped: Any = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **case.config)
    ).eval()  # fmt: skip
    method = f"lora(rank = {RANK}, alpha = {ALPHA})  strategy = {strategy}"
    program = surgery.parse(f"adapt {case.pattern} {{ with {method} }}\nstep {{ loss = cross_entropy  compile = off }}")
    step = surgery.compile(program, model=model, example_inputs=inputs)

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, tensors in step.parameters_by_site.items():
            for tensor, (theirs, laid_out) in factors(wrapped, path, name).items():
                ours = tensors[tensor]
                ours.copy_(0.2 * torch.randn(ours.shape, generator=generator, dtype=torch.float64))
                theirs.copy_(laid_out(ours))

    expected: Tensor = wrapped(**inputs).logits
    found: Tensor = step.module(**inputs, training=False)
    torch.testing.assert_close(found, expected)
    torch.autograd.backward([expected.square().mean(), found.square().mean()])
    for path, tensors in step.parameters_by_site.items():
        for tensor, (theirs, laid_out) in factors(wrapped, path, name).items():
            torch.testing.assert_close(laid_out(tensors[tensor].grad), theirs.grad)
    with torch.no_grad():
        merged = wrapped.merge_and_unload().eval()
        torch.testing.assert_close(step.merge()(**inputs).logits, merged(**inputs).logits)
