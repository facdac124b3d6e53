"""Every kind of weight that a method can adapt, against a plain copy of the model that holds the effective weight."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import surgery
from surgery.compiler.algebra.base import logical, stored_like
from surgery.compiler.algebra.evaluate import Evaluator
from surgery.compiler.algebra.instance import instance

LORA, FOLD = "lora(rank = 3)", "lora(rank = 3)  strategy = fold"
RECOMPUTE = "lora(rank = 3)  strategy = recompute"
METHODS = (LORA, FOLD, RECOMPUTE, "dora(rank = 3)", "delta_lora(rank = 3, start = 0)  update = literal")
FORCED = ("scaling()  strategy = fold", "scaling()  strategy = recompute")
SCALING = "method scaling() { requires in == out;  v = train zeros[in];  delta = diag(v) }\n"


@dataclass(frozen=True)
class Case:
    """A rule over weights of one kind of a tiny model."""

    architecture: str
    rule: str  # with {method}
    methods: tuple[str, ...] = METHODS
    settings: dict[str, Any] = field(default_factory=dict)
    also: str = ""
    sites: int = 1


CASES = {
    "linear": Case("bert", "adapt bert.encoder.layer.*.output.dense {{ with {method} }}", sites=2),
    "conv1d": Case("gpt2", "adapt transformer.h.*.attn.c_attn {{ with {method} }}", sites=2),
    "embedding": Case("bert", "adapt bert.embeddings.word_embeddings {{ with {method} }}"),
    "positions": Case("gpt2", "adapt transformer.wpe {{ with {method} }}"),
    "tied": Case("qwen2", "adapt lm_head {{ with {method}  tie }}"),
    "tied_embedding": Case("gpt2", "adapt transformer.wte {{ with {method}  tie }}"),
    "convolution": Case("vit", "adapt vit.embeddings.patch_embeddings.projection {{ with {method} }}"),
    "layer_norm": Case("bert", "adapt bert.encoder.layer.*.output.LayerNorm {{ with {method} }}",
                       ("scaling()", *FORCED), also=SCALING, sites=2),
    "rms_norm": Case("llama", "adapt model.layers.*.input_layernorm {{ with {method} }}",
                     ("scaling()", *FORCED), also=SCALING, sites=2),
    "parameter": Case("qwen3_moe", "adapt model.layers.*.mlp.gate {{ with {method} }}", sites=2),
}  # fmt: skip
PAIRS = [(name, method) for name, case in CASES.items() for method in case.methods]


def build(architectures: Any, name: str, method: str, optimizer: str = "sgd(lr = 0.1)") -> tuple[Case, Any, Any, Any]:
    """The case, its architecture, the model in float64 and the program."""
    case = CASES[name]
    architecture = architectures[case.architecture]
    model = architecture.model(**case.settings).double()
    labels = f"{architecture.task}(labels = 3)" if "classification" in architecture.task else architecture.task
    program = surgery.parse(
        f'model "given" {{ task = {labels} }}\n{case.also}{case.rule.format(method=method)}\n'
        f"step {{ optimizer = {optimizer}  batch = 4  steps = 6  compile = off }}"
    )
    return case, architecture, model, program


def inputs_of(architecture: Any, rows: int = 4, length: int = 9) -> dict[str, Tensor]:
    """Inputs with numbers in float64."""
    given = architecture.inputs(rows, length)
    return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


def compiled(architectures: Any, name: str, method: str, optimizer: str = "sgd(lr = 0.1)") -> tuple[Any, Any, Any]:
    case, architecture, model, program = build(architectures, name, method, optimizer)
    step = surgery.compile(program, model=model, example_inputs=inputs_of(architecture))
    assert len(step.plan.sites) == case.sites
    return architecture, model, step


def disturb(tensors: dict[str, dict[str, Tensor]]) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for site in tensors.values():
            for tensor in site.values():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))


def effective(step: Any, site: Any, tensors: dict[str, Tensor]) -> Tensor:
    """The weight of a site by the evaluator alone, with gradient to the tensors, as the model stores it."""
    formula = instance(step.plan, site.formula)
    weight = logical(step.weights[site.parameter].detach(), site)
    value = Evaluator(lambda: weight, tensors, torch.float64)(formula.expression)
    return stored_like(weight + value if formula.form == "delta" else value, site)


def logits(model: nn.Module, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits with other weights, in evaluation."""
    result: Tensor = functional_call(model.eval(), weights, (), inputs).logits
    return result


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_the_start_is_the_model(name: str, method: str, architectures: Any) -> None:
    architecture, model, step = compiled(architectures, name, method)
    for rows, length in ((4, 9), (2, 5)):
        inputs = inputs_of(architecture, rows, length)
        with torch.no_grad():
            torch.testing.assert_close(step.forward(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_the_forward_and_its_gradients_are_those_of_the_effective_weight(
    name: str, method: str, architectures: Any
) -> None:
    architecture, model, step = compiled(architectures, name, method)
    disturb(step.parameters_by_site)
    inputs = inputs_of(architecture)
    trained = {
        (site.path, tensor.name): step.parameters_by_site[site.path][tensor.name]
        for site in step.plan.sites
        for tensor in site.tensors
        if tensor.role == "train"
    }
    found = step.module(**inputs, training=False)
    gradients = torch.autograd.grad(found.square().mean(), list(trained.values()))

    weights = {site.parameter: effective(step, site, step.parameters_by_site[site.path]) for site in step.plan.sites}
    expected = logits(model, weights, inputs)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(expected, logits(model, {}, inputs))
    wanted = torch.autograd.grad(expected.square().mean(), list(trained.values()))
    for key, ours, theirs in zip(trained, gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, key=key: f"{key}: {text}")
    for site in step.plan.sites:
        torch.testing.assert_close(stored_like(step.effective_weight(site.path), site), weights[site.parameter])


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_the_merged_model_is_the_adapted_one(name: str, method: str, architectures: Any) -> None:
    architecture, model, step = compiled(architectures, name, method)
    disturb(step.parameters_by_site)
    inputs, before = inputs_of(architecture), copy.deepcopy(model.state_dict())
    merged = step.merge()
    assert type(merged) is type(model) and merged.state_dict().keys() == before.keys()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, step.forward(**inputs).logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    adapted = {name for site in step.plan.sites for name in _names(model, site.parameter)}
    for key, value in merged.state_dict().items():
        assert torch.equal(value, before[key]) != (key in adapted), key


def _names(model: nn.Module, parameter: str) -> list[str]:
    """All names of a parameter: more than one where it is tied."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return [name for name, held in named.items() if held is named[parameter]]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_training_lowers_the_loss(name: str, method: str, architectures: Any) -> None:
    architecture, _, step = compiled(architectures, name, method, "adamw(lr = 1e-2)")
    batch = {**inputs_of(architecture), "labels": architecture.labels()}
    losses = [float(step(batch).loss) for _ in range(5)]
    assert losses[-1] < losses[0], losses


@pytest.mark.parametrize(("name", "method"), [pair for pair in PAIRS if "delta_lora" not in pair[1]])
def test_module_scope_is_graph_scope(name: str, method: str, architectures: Any) -> None:
    architecture, model, step = compiled(architectures, name, method)
    _, _, twin, program = build(architectures, name, method)
    disturb(step.parameters_by_site)
    inputs = inputs_of(architecture)
    surgery.apply(program, twin)
    named = dict(twin.named_parameters()) | dict(twin.named_buffers())
    with torch.no_grad():
        for site in step.plan.sites:
            for tensor in site.tensors:
                named[tensor.key].copy_(step.weights[tensor.key])
        expected = step.forward(**inputs).logits
        torch.testing.assert_close(twin(**inputs).logits, expected)
        torch.testing.assert_close(copy.deepcopy(twin)(**inputs).logits, expected)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == step.plan.totals.trainable
