"""LoRA, rsLoRA and DoRA against peft 0.21: the same factors give the same outputs and the same gradients.

Only the public contract is used. A gradient is read off one step of plain SGD: with a large rate the step is much
longer than the parameter, so that `(before - after) / rate` keeps all digits of float32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import surgery

pytestmark = pytest.mark.usefixtures("captured_once")

RATE = 1e5
RANK, ALPHA = 4, 8
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Architecture:
    """A tiny model with what both sides have to know about it."""

    task: str
    config: dict[str, Any]
    pattern: str
    targets: tuple[str, ...]  # peft's names of the same modules
    transposed: bool = False

    def build(self) -> nn.Module:
        """The model with random weights, without dropout of its own."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(**self.config)
        model: nn.Module
        if self.task == "causal_lm":
            model = AutoModelForCausalLM.from_config(config)
        else:
            model = AutoModelForSequenceClassification.from_config(config)
        return model.train()

    def batch(self) -> dict[str, Tensor]:
        """Four rows of 12 tokens; the last row of a classifier's batch is padded."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 60, (4, 12), generator=generator)
        if self.task == "causal_lm":
            return {"input_ids": ids, "labels": ids.clone()}
        mask = torch.ones_like(ids)
        mask[3, 8:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])}

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of the task, written out."""
        if self.task == "causal_lm":
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return F.cross_entropy(logits, labels)


ARCHITECTURES = {
    "llama": Architecture(
        "causal_lm",
        {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 32,
        },
        "model.layers.*.{self_attn,mlp}.*_proj",
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "gpt2": Architecture(
        "causal_lm",
        {
            "model_type": "gpt2",
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "vocab_size": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "transformer.h.*.{attn,mlp}.c_*",
        ("c_attn", "c_proj", "c_fc"),
        transposed=True,
    ),
    "bert": Architecture(
        "sequence_classification",
        {
            "model_type": "bert",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 64,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "num_labels": 3,
        },
        "bert.encoder.layer.** : Linear",
        ("query", "key", "value", "output.dense", "intermediate.dense"),
    ),
}

METHODS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def spec(architecture: Architecture, method: str, dropout: float) -> str:
    """A program for a model that is given."""
    loss = "causal_lm" if architecture.task == "causal_lm" else "cross_entropy"
    arguments = f"rank = {RANK}, alpha = {ALPHA}, dropout = {dropout}"
    return f"""
        adapt {architecture.pattern} {{ with {method}({arguments}) }}
        step {{ optimizer = sgd(lr = {RATE})  batch = 4  steps = 1  loss = {loss}  compile = off }}
    """


def reference(architecture: Architecture, model: nn.Module, method: str, dropout: float) -> Any:
    """The same adaptation by peft, on a copy."""
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules=list(architecture.targets),
        fan_in_fan_out=architecture.transposed,
        **METHODS[method],
    )
    return peft.get_peft_model(copy.deepcopy(model), config).train()


def factors(wrapped: Any, path: str) -> dict[str, nn.Parameter]:
    """peft's parameters of a site, by the names of the methods."""
    layer = wrapped.base_model.model.get_submodule(path)
    found = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    if "default" in layer.lora_magnitude_vector:
        found["m"] = layer.lora_magnitude_vector["default"].weight
    return found


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Equal to `TOLERANCE` of the largest entry."""
    error = float((ours - theirs).abs().max())
    assert error <= TOLERANCE * float(theirs.abs().max()), f"{what}: off by {error}"


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_gradients_equal_peft(name: str, method: str, dropout: float) -> None:
    architecture = ARCHITECTURES[name]
    model, batch = architecture.build(), architecture.batch()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    wrapped = reference(architecture, model, method, dropout)
    step = surgery.compile(surgery.parse(spec(architecture, method, dropout)), model=model, example_inputs=inputs)
    assert set(step.parameters_by_site) == {
        path.removeprefix("base_model.model.").removesuffix(".lora_A")
        for path, _ in wrapped.named_modules()
        if path.endswith(".lora_A")
    }

    # The same factors on both sides, none of them at its start, where the gradient of A is zero.
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, tensors in step.parameters_by_site.items():
            for tensor, parameter in factors(wrapped, path).items():
                if tensor == "m":
                    values = tensors["m"] * (1 + 0.1 * torch.rand(tensors["m"].shape, generator=generator))
                else:
                    values = 0.1 * torch.randn(parameter.shape, generator=generator)
                tensors[tensor].copy_(values)
                parameter.copy_(values)

    with torch.no_grad():
        close(step.forward(**inputs).logits, wrapped.eval()(**inputs).logits, "logits in evaluation")

    before = {
        path: {key: value.detach().clone() for key, value in t.items()} for path, t in step.parameters_by_site.items()
    }
    torch.manual_seed(7)  # peft draws a mask per site from torch's generator, in the order of the forward
    theirs = architecture.loss(wrapped.train()(**inputs).logits, batch["labels"])
    theirs.backward()  # type: ignore[no-untyped-call]
    torch.manual_seed(7)
    ours = step(batch).loss
    close(ours, theirs.detach(), "loss in training")
    for path, tensors in step.parameters_by_site.items():
        for tensor, parameter in factors(wrapped, path).items():
            assert parameter.grad is not None
            gradient = (before[path][tensor] - tensors[tensor].detach()) / RATE
            close(gradient, parameter.grad, f"gradient of {path}.{tensor}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merged_model_equals_pefts(name: str, method: str) -> None:
    architecture = ARCHITECTURES[name]
    model, batch = architecture.build(), architecture.batch()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    wrapped = reference(architecture, model, method, 0.0)
    step = surgery.compile(surgery.parse(spec(architecture, method, 0.0)), model=model, example_inputs=inputs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, tensors in step.parameters_by_site.items():
            for tensor, parameter in factors(wrapped, path).items():
                values = 0.1 * torch.randn(parameter.shape, generator=generator)
                tensors[tensor].copy_(values)
                parameter.copy_(values)
        merged, theirs = step.merge().eval(), wrapped.merge_and_unload().eval()
        assert type(merged) is type(model)
        close(merged(**inputs).logits, theirs(**inputs).logits, "logits after merging")
