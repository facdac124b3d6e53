"""The models of the behaviour matrix, in float64: a perceptron of several shapes, encoders and decoders, a GPT-2."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

SHAPES = {  # of the perceptron, the first that a method admits
    "odd": (7, 13),
    "odd and square": (9, 9),
    "divisible": (12, 24),
    "divisible and square": (12, 12),
}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40, "max_position_embeddings": 24}
BERT = {"model_type": "bert", **SMALL, "hidden_size": 24, "intermediate_size": 36, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2, "num_labels": 3}  # fmt: skip
LLAMA = {"model_type": "llama", **SMALL, "hidden_size": 24, "intermediate_size": 36, "num_key_value_heads": 2,
         "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
ENCODERS = (BERT, LLAMA, {**LLAMA, "num_key_value_heads": 4})  # the first whose modules a spec's patterns find
GPT2 = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 24, "n_inner": 36,
        "vocab_size": 40, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


class Block(nn.Module):
    """Up, an activation, down and a norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(inputs, outputs), nn.Linear(outputs, inputs, bias=False)
        self.norm = nn.LayerNorm(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs]` to the same."""
        found: Tensor = self.norm(x + self.down(torch.tanh(self.up(x))))
        return found


class Perceptron(nn.Module):
    """Two blocks, a parameter that no method touches, and a head of three classes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(inputs, outputs), Block(inputs, outputs)])
        self.scale = nn.Parameter(torch.full((inputs,), 1.5))
        self.head = nn.Linear(inputs, 3)
        self.config = SimpleNamespace(num_attention_heads=3, hidden_size=inputs)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[batch, 3]` from features `[batch, inputs]`."""
        for block in self.blocks:
            features = block(features)
        logits: Tensor = self.head(features * self.scale)
        return logits


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in float64 of which no parameter is a constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def transformer(settings: Mapping[str, Any]) -> nn.Module:
    """A small model of a transformers architecture that computes all in its weights' dtype."""
    config = AutoConfig.for_model(**settings)
    model: nn.Module
    if config.model_type == "bert":
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):  # transformers' own computes in float32
            model.set_submodule(path, nn.RMSNorm(config.hidden_size, config.rms_norm_eps))
    return model


MODELS: dict[str, list[Callable[[], nn.Module]]] = {
    "mlp": [functools.partial(Perceptron, *shape) for shape in SHAPES.values()],
    "encoder": [functools.partial(transformer, settings) for settings in ENCODERS],
    "gpt2": [functools.partial(transformer, GPT2)],
}


@functools.cache
def model_of(kind: str, index: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model that all cases share: nothing that surgery does changes the model that it is given."""
    return seeded(MODELS[kind][index]).to(dtype)


def like(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch in the model's dtype."""
    dtype = next(model.parameters()).dtype
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def is_causal(model: nn.Module) -> bool:
    """Whether the model predicts the next token."""
    return type(model).__name__.endswith(("CausalLM", "LMHeadModel"))
