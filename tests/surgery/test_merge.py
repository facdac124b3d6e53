"""Merging into copies of real classes: what is stored where, ties, rounding, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import surgery
from surgery.compiler.diagnostics import SurgError
from surgery.compiler.plan import Facts, ModelPlan, Place, Plan, Site, Totals
from surgery.peft.write import export
from surgery.runtime.merge import merged, save_merged

pytestmark = pytest.mark.usefixtures("captured_once")


class Adapted:
    """A model with one site whose effective weight is W plus a constant, and its effective bias b plus another."""

    def __init__(
        self,
        model: nn.Module,
        path: str,
        weight: float = 0.25,
        bias: float | None = None,
        untied: bool = False,
        **facts: bool,
    ):
        self.model = model
        self.weights: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.added, self.added_bias = weight, bias
        module = model.get_submodule(path)
        self.transposed = type(module).__name__ == "Conv1D"
        known: dict[str, Any] = {
            "identity_at_start": True, "rank_bound": 4, "merges": True, "exports_as_lora": True, "keeps_zeros": False,
            "moves_base": False, "needs_dense_weight": False,
        }  # fmt: skip
        site = Site(
            path=path, parameter=f"{path}.weight", module_class="Conv1D" if self.transposed else "Linear", kind=path,
            layer=None, shape=(1, 1), transposed=self.transposed, dtype="float32", untied=untied, bias=True, rule=0,
            formula="f", method="lora", rank=4,
            tensors=(), trainable=0, frozen=0, facts=Facts(**(known | facts)),
            place=Place(file="demo.surg", line=3, column=1, start=2, end=7),
        )  # fmt: skip
        self.plan = Plan(
            spec="\n\nadapt q_proj { with lora() }\n", file="demo.surg",
            model=ModelPlan(source="given", name=""), sites=(site,), formulas={}, tokens=0,
            totals=Totals(sites=1, trainable=0, frozen=0, model=1, share=0.0),
        )  # fmt: skip

    def effective_weight(self, path: str) -> Tensor:
        stored = self.model.get_submodule(path).get_parameter("weight").detach().float()
        return (stored.T if self.transposed else stored) + self.added

    def effective_bias(self, path: str) -> Tensor | None:
        if self.added_bias is None:
            return None
        own: Any = getattr(self.model.get_submodule(path), "bias", None)
        return torch.tensor([self.added_bias]) if own is None else own.detach() + self.added_bias


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def test_a_copy_of_the_same_class_gets_the_rounded_weight() -> None:
    model = llama().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    path = "model.layers.0.self_attn.q_proj"
    result = merged(Adapted(model, path, 1 / 3))
    assert type(result) is LlamaForCausalLM
    expected = (before[f"{path}.weight"].float() + 1 / 3).to(torch.bfloat16)
    assert torch.equal(result.state_dict()[f"{path}.weight"], expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed = [name for name, tensor in result.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [f"{path}.weight"]


def test_conv1d_is_stored_transposed_with_its_bias() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    path = "transformer.h.0.attn.c_attn"
    step = Adapted(model, path, bias=0.5)
    step.effective_weight = lambda path: torch.arange(48.0 * 16).reshape(48, 16)  # type: ignore[method-assign]
    result = merged(step).get_submodule(path)
    assert torch.equal(result.get_parameter("weight").T, torch.arange(48.0 * 16).reshape(48, 16))
    assert torch.allclose(result.get_parameter("bias"), model.get_submodule(path).get_parameter("bias") + 0.5)


def test_whole_parameters_come_from_the_step() -> None:
    model = llama()
    step = Adapted(model, "lm_head")
    step.weights["model.norm.weight"] = torch.full((16,), 7.0)
    assert merged(step).get_parameter("model.norm.weight").tolist() == [7.0] * 16


def test_an_adapted_head_is_untied_and_survives_a_plain_reload(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    ids = torch.arange(10)[None]
    save_merged(Adapted(model, "lm_head", untied=True), tmp_path / "merged")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert loaded.config.tie_word_embeddings is False and model.config.tie_word_embeddings is True
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight + 0.25)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        assert torch.allclose(loaded(ids).logits, hidden @ (model.lm_head.weight + 0.25).T, atol=1e-5)


def refused(step: Adapted) -> str:
    with pytest.raises(SurgError) as caught:
        merged(step)
    assert {found.code for found in caught.value.diagnostics} == {"SURG055"}
    return str(caught.value)


def test_what_cannot_merge_says_why() -> None:
    path = "model.layers.0.self_attn.q_proj"
    assert "does not merge into a weight" in refused(Adapted(llama(), path, merges=False))
    assert "needs a bias, and this Linear has none" in refused(Adapted(llama(), path, bias=1.0))
    assert "does not fit torch.float16" in refused(Adapted(llama().half(), path, 1e6))
    assert "--> demo.surg:3:1" in refused(Adapted(llama(), path, float("nan")))
    merged(Adapted(llama(), path, bias=0.0))  # a bias of zeros is none


def test_a_head_that_the_class_always_ties_is_refused() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    if model.lm_head.weight is model.shared.weight:
        assert "always ties" in refused(Adapted(model, "lm_head", untied=True))


def test_targets_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(SurgError, match="exists already"):
            save_merged(Adapted(llama(), "lm_head"), target)
    with pytest.raises(SurgError, match="no transformers model"):
        save_merged(Adapted(nn.Sequential(nn.Linear(2, 2)), "0"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_merged_weight_is_rounded_once(tmp_path: Path) -> None:
    """In bfloat16: the number nearest to the float64 sum; the safe merge of peft rounds the change, then the sum."""
    model = llama(hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    program = surgery.parse('model "given" { task = causal_lm }\nadapt **.*_proj { with lora(rank = 4, alpha = 7) }')
    step = surgery.compile(program, model, {"input_ids": torch.ones(2, 5, dtype=torch.long)})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensors in step.parameters_by_site.values():
            for tensor in tensors.values():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    export(step, tmp_path, tmp_path / "adapter")
    adapted: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    ours, theirs = step.merge(), adapted.merge_and_unload(safe_merge=True)
    nearer = 0
    for path, tensors in step.parameters_by_site.items():
        base, left, right = model.get_parameter(f"{path}.weight"), tensors["B"], tensors["A"]
        truth = (base.double() + 7 / 4 * left.double() @ right.double()).detach()
        own, other = (merged.get_parameter(f"{path}.weight").detach().double() for merged in (ours, theirs))
        assert bool(((own - truth).abs() <= (other - truth).abs() + 1e-7).all())  # float32's sum is that far off
        assert float((own - truth).square().sum()) <= float((other - truth).square().sum())
        assert float((own.bfloat16() == truth.bfloat16()).double().mean()) > 0.999
        nearer += int(((own - truth).abs() < (other - truth).abs() - 1e-7).sum())
    assert nearer > 0
