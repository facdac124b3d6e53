"""A trained run in module scope generates, with its cache, what the merged model generates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery

pytestmark = pytest.mark.usefixtures("captured_once")

SIZES: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
METHODS = {
    "lora": "lora(rank = 4)",
    "dora": "dora(rank = 4)",
    "telescoped": "delta_lora(rank = 4, start = 1)  update = telescope",
    "literal": "delta_lora(rank = 4, start = 1)  update = literal",
    "lors": "lors(rank = 4)",
    "circulant": "circulant()",
    "hadamard": "hadamard()",
    "adapter": "surm_adapter()",
}
SITES = {"llama": "model.layers.*.self_attn.{q_proj,o_proj}", "gpt2": "transformer.h.*.attn.c_proj"}
WHOLE = {"llama": "train model.norm", "gpt2": "train transformer.ln_f"}


def model_of(kind: str, dtype: torch.dtype) -> Any:
    """A decoder with zeros in its matrices, which masked methods keep."""
    torch.manual_seed(0)
    if kind == "llama":
        made: Any = LlamaForCausalLM(LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, pad_token_id=0, **SIZES))  # fmt: skip
    else:
        made = GPT2LMHeadModel(GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SIZES,
        ))  # fmt: skip
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 2 and "w" not in name.rpartition(".")[0].rpartition(".")[2]:
                parameter.mul_(torch.rand(parameter.shape) > 0.3)
    return made.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_generates_what_the_merged_model_does(method: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(kind, dtype)
    ids = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    text = f"adapt {SITES[kind]} {{ with {METHODS[method]} }}\n{WHOLE[kind]}\n"
    text += "step { optimizer = adamw(lr = 3e-2)  batch = 4  steps = 4  loss = causal_lm }"
    step = surgery.compile(surgery.parse(text), model, {"input_ids": ids}, calibration=[batch])
    for _ in range(4):
        step(batch)
    step.save(tmp_path / "run")
    attached: Any = surgery.apply(tmp_path / "run", copy.deepcopy(model))
    prompt, count, more = ids[:, :3], 20, {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20}
    exact = dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(
            attached(ids).logits, step.forward(input_ids=ids).logits,
            rtol=1e-10 if exact else 1e-4, atol=1e-10 if exact else 1e-5,
        )  # fmt: skip
        found = attached.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **more)
        untrained = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **more)
    assert found.shape == (4, 3 + count) and not torch.equal(found, untrained)
    try:
        merged: Any = step.merge()
    except surgery.SurgError as error:  # what is no weight, or no weight without a bias, is checked without a cache
        assert {found.code for found in error.diagnostics} == {"SURG055"} and method in ("hadamard", "adapter")
        grown = prompt
        for _ in range(count):
            logits = step.forward(input_ids=grown).logits[:, -1]
            logits[:, SIZES["eos_token_id"]] = -torch.inf
            grown = torch.cat([grown, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(found, grown)
        return
    assert torch.equal(found, merged.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **more))
