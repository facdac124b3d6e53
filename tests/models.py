"""Tiny random models of the architectures that surgery supports: float32, seeded, no dropout unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DECODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _decoder(dropout: float) -> dict[str, Any]:
    return {**DECODER, "attention_dropout": dropout}


def _encoder(dropout: float) -> dict[str, Any]:
    return {**ENCODER, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}


def llama(dropout: float, **settings: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**_decoder(dropout), **settings}))


def qwen2(dropout: float, **settings: Any) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**{**_decoder(dropout), "tie_word_embeddings": True, **settings}))


def qwen3(dropout: float, **settings: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**{**_decoder(dropout), "head_dim": 8, **settings}))


def mistral(dropout: float, **settings: Any) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**{**_decoder(dropout), "sliding_window": None, **settings}))


def gemma2(dropout: float, **settings: Any) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    fields = {**_decoder(dropout), "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
    return Gemma2ForCausalLM(Gemma2Config(**{**fields, **settings}))


def qwen3_moe(dropout: float, **settings: Any) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**_decoder(dropout), **experts, **settings}))


def gpt2(dropout: float, **settings: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **drops, "bos_token_id": 1, "eos_token_id": 2, **settings}))


def opt(dropout: float, **settings: Any) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    fields = {
        "vocab_size": 97,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "dropout": dropout,
        "attention_dropout": dropout,
    }
    return OPTForCausalLM(OPTConfig(**{**fields, **settings}))


def bert(dropout: float, **settings: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**{**_encoder(dropout), "num_labels": 3, **settings}))


def roberta(dropout: float, **settings: Any) -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(RobertaConfig(**{**_encoder(dropout), "pad_token_id": 1, **settings}))


def deberta_v2(dropout: float, **settings: Any) -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    positions = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "num_labels": 3}
    fields = {**_encoder(dropout), **positions, "norm_rel_ebd": "layer_norm", "share_att_key": True}
    fields |= {"pooler_dropout": dropout}
    return DebertaV2ForSequenceClassification(DebertaV2Config(**{**fields, **settings}))


def vit(dropout: float, **settings: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    fields = {key: value for key, value in _encoder(dropout).items() if key not in ("vocab_size", "pad_token_id")}
    fields.pop("max_position_embeddings")
    return ViTForImageClassification(
        ViTConfig(**{**fields, "image_size": 16, "patch_size": 8, "num_labels": 3, **settings})
    )


def t5(dropout: float, **settings: Any) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    fields = {
        "vocab_size": 97,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": dropout,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return T5ForConditionalGeneration(T5Config(**{**fields, **settings}))


@dataclass(frozen=True)
class Architecture:
    """One architecture of the matrix: `model()` makes the tiny model, `batch()` the inputs and labels of its task."""

    name: str
    task: str
    factory: Callable[..., nn.Module]
    adapt: str = "model.layers.*.self_attn.{q_proj,v_proj}"  # a pattern of some of its weights

    def model(self, dropout: float = 0.0, **settings: Any) -> nn.Module:
        """A tiny random model in evaluation mode; `settings` go to its config. The weights are the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.factory(dropout, **settings)
            with torch.no_grad():
                for parameter in model.parameters():  # biases and norms start as constants: give every number a say
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    def inputs(self, rows: int = 4, length: int = 9) -> dict[str, Tensor]:
        """Inputs without padding, other ones for other sizes, none of which are those that capture uses."""
        generator = torch.Generator().manual_seed(rows * 100 + length)

        def tokens(width: int) -> Tensor:
            return torch.randint(3, 97, (rows, width), generator=generator)

        if self.task == "image_classification":
            return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
        inputs = {"input_ids": tokens(length)}
        if self.task != "causal_lm":
            inputs["attention_mask"] = torch.ones(rows, length, dtype=torch.int64)
        if self.task == "seq2seq_lm":
            inputs["decoder_input_ids"] = tokens(length - 3)
        return inputs

    def spec(self, method: str = "lora(rank = 4)", step: str = "optimizer = adamw(lr = 1e-2)") -> str:
        """A program that adapts the model of `model()` for its task."""
        task = f"{self.task}(labels = 3)" if self.task.endswith("classification") else self.task
        model = f'model "given" {{ task = {task} }}'
        return f"{model}\nadapt {self.adapt} {{ with {method} }}\nstep {{ {step}  steps = 8 }}\n"

    def labels(self, rows: int = 4, length: int = 9) -> Tensor:
        """Labels that go with `inputs` of the same sizes."""
        inputs = self.inputs(rows, length)
        if self.task.endswith("classification"):
            return torch.arange(rows) % 3
        return inputs["decoder_input_ids" if self.task == "seq2seq_lm" else "input_ids"].clone()


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "causal_lm", llama),
        Architecture("qwen2", "causal_lm", qwen2),
        Architecture("qwen3", "causal_lm", qwen3),
        Architecture("mistral", "causal_lm", mistral),
        Architecture("gemma2", "causal_lm", gemma2),
        Architecture("qwen3_moe", "causal_lm", qwen3_moe),
        Architecture("gpt2", "causal_lm", gpt2, "transformer.h.*.{attn,mlp}.c_*"),
        Architecture("opt", "causal_lm", opt, "**.{q_proj,v_proj,fc1}"),
        Architecture("bert", "sequence_classification", bert, "bert.encoder.layer.*.attention.self.{query,value}"),
        Architecture("roberta", "masked_lm", roberta, "roberta.encoder.layer.*.attention.self.{query,value}"),
        Architecture(
            "deberta_v2",
            "sequence_classification",
            deberta_v2,
            "deberta.**.{query_proj,value_proj}",
        ),
        Architecture("vit", "image_classification", vit, "vit.**: Linear"),
        Architecture("t5", "seq2seq_lm", t5, "**.{q,v,wi}"),
    )
}
