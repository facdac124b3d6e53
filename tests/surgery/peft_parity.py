"""One method on both sides: our step and peft's model with equal tensors, compared in outputs and gradients.

In float64, so that 1e-10 is left, except where peft itself computes in float32. A gradient is read off one step of
plain SGD: with a large rate it is much longer than the parameter, so that `(before - after) / rate` keeps its digits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
)

import surgery

RATE = 1e5
Part = Callable[[Tensor], Tensor]  # a parameter itself, or its gradient
Layout = Callable[[Any, Part], dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A small model in float64, drawn in float32, whose sizes all blocks divide, and a batch with labels."""

    make: Callable[[], nn.Module]
    batch: dict[str, Tensor]
    causal: bool = False

    def build(self) -> Any:
        """The model, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().double()

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The batch without its labels."""
        return {key: value for key, value in self.batch.items() if key != "labels"}

    def loss(self, logits: Tensor) -> Tensor:
        """The mean cross-entropy of the task, written out."""
        if self.causal:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), self.batch["labels"][:, 1:].flatten())
        return F.cross_entropy(logits, self.batch["labels"])


def _tokens() -> Tensor:
    return torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(1))


ENCODER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1,
}  # fmt: skip


def _bert() -> nn.Module:
    config = AutoConfig.for_model("bert", **ENCODER, vocab_size=64, max_position_embeddings=32)
    model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model


def _gpt2() -> nn.Module:
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _vit() -> nn.Module:
    config = AutoConfig.for_model("vit", **ENCODER, image_size=16, patch_size=4)
    model: nn.Module = AutoModelForImageClassification.from_config(config)
    return model


LABELS = torch.tensor([0, 1, 2, 1])
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BERT = Subject(_bert, {"input_ids": _tokens(), "attention_mask": torch.ones(4, 12).long().tril(8), "labels": LABELS})
GPT2 = Subject(_gpt2, {"input_ids": _tokens(), "labels": _tokens()}, causal=True)
LLAMA = Subject(_llama, {"input_ids": _tokens(), "labels": _tokens()}, causal=True)
VIT = Subject(_vit, {"pixel_values": PIXELS, "labels": LABELS})


def by_name(**names: str) -> Layout:
    """The layout where peft's tensors have our shapes: our name = its name."""
    return lambda layer, part: {ours: part(getattr(layer, theirs)["default"]) for ours, theirs in names.items()}


@dataclass(frozen=True)
class Case:
    """One method; `layout` gives peft's parameters (or their gradients) of a layer as ours, by name."""

    rules: str
    config: Callable[[], peft.PeftConfig]
    layout: Layout
    tolerance: float = 1e-10
    subject: Subject = BERT


def compare(case: Case) -> None:
    """Outputs, merged outputs and the gradients of all trained tensors are equal, away from the start."""
    subject = case.subject
    step, wrapped, layers = _sides(case)
    with torch.no_grad():
        theirs = wrapped.eval()(**subject.inputs).logits
        assert not torch.allclose(theirs, subject.build().eval()(**subject.inputs).logits)
        _close(step.forward(**subject.inputs).logits, theirs, case.tolerance, "logits")
        _close(step.merge().eval()(**subject.inputs).logits, theirs, case.tolerance, "logits after merging")

    trained = {(site.path, t.name) for site in step.plan.sites for t in site.tensors if t.role == "train"}
    trained |= {tuple(entry.name.rsplit(".", 1)) for entry in step.plan.trained}
    before = {key: _tensor(step, *key).detach().clone() for key in trained}
    subject.loss(wrapped(**subject.inputs).logits).backward()  # type: ignore[no-untyped-call]
    step(subject.batch)
    compared = set()
    for path, layer in layers.items():
        for name, gradient in case.layout(layer, _gradient).items():
            if (path, name) in trained:
                moved = (before[path, name] - _tensor(step, path, name).detach()) / RATE
                _close(moved, gradient, case.tolerance, f"gradient of {path}.{name}")
                compared.add((path, name))
    assert compared == trained


def _sides(case: Case) -> tuple[Any, Any, dict[str, Any]]:
    """Our step, peft's model, and its layers by path; the tensors are peft's start with noise on what is trained."""
    model = case.subject.build()
    wrapped: Any = peft.get_peft_model(copy.deepcopy(model).float(), case.config()).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    loss = "causal_lm" if case.subject.causal else "cross_entropy"
    settings = f"optimizer = sgd(lr = {RATE})  batch = 4  steps = 1  loss = {loss}  compile = off"
    program = surgery.parse(f"{case.rules} step {{ {settings} }}")
    step = surgery.compile(program, model=model, example_inputs=case.subject.inputs)
    layers = {path: wrapped.base_model.model.get_submodule(path) for path in step.parameters_by_site}
    with torch.no_grad():
        for path, layer in layers.items():
            for name, value in case.layout(layer, lambda tensor: tensor.detach()).items():
                ours = _tensor(step, path, name)
                assert ours.shape == value.shape, f"{path}.{name}"
                ours.copy_(value)
    return step, wrapped, layers


def _tensor(step: Any, path: str, name: str) -> Tensor:
    """A tensor of the site's method, or a parameter of its module that is trained as it is."""
    found: Tensor = step.parameters_by_site[path].get(name, step.weights.get(f"{path}.{name}"))
    return found


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient, zero where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _close(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    """Equal to `tolerance` of the largest entry."""
    error = float((ours - theirs).abs().max())
    assert error <= tolerance * float(theirs.abs().max()), f"{what}: off by {error}"
