"""What every method of the library has to do, whatever its equation. A new file in `surgery/methods` is tested by this
matrix without an edit here."""

from __future__ import annotations

import copy
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertConfig, BertForSequenceClassification

import surgery

METHODS = sorted(
    entry.name.removesuffix(".surg")
    for entry in (files("surgery") / "methods").iterdir()
    if entry.name.endswith(".surg")
)
MODELS = ["mlp", "bert"]

pytestmark = [pytest.mark.parametrize("method", METHODS), pytest.mark.parametrize("kind", MODELS)]


class Perceptron(nn.Module):
    """Three linears with odd sizes, one of them without a bias, and a parameter that no method touches."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(7, 13), nn.Linear(13, 11, bias=False)])
        self.scale = nn.Parameter(torch.full((11,), 1.5))
        self.head = nn.Linear(11, 3)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[batch, 3]` from features `[batch, 7]`."""
        hidden = torch.tanh(self.blocks[0](features))
        logits: Tensor = self.head(torch.tanh(self.blocks[1](hidden)) * self.scale)
        return logits


def build(kind: str) -> tuple[nn.Module, str]:
    """A model in float64 and the pattern of its adapted sites."""
    torch.manual_seed(0)
    if kind == "mlp":
        return Perceptron().double(), "blocks.*"
    config = BertConfig(
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=40,
        max_position_embeddings=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    config.num_labels = 3
    model: nn.Module = BertForSequenceClassification(config)
    return model.double(), "bert.encoder.layer.** : Linear"


def batch(kind: str, seed: int = 1, rows: int = 4) -> dict[str, Tensor]:
    """A batch with labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    if kind == "mlp":
        return {"features": torch.randn(rows, 7, generator=generator, dtype=torch.float64), "labels": labels}
    ids = torch.randint(1, 40, (rows, 9), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def inputs(of: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch without its labels."""
    return {name: tensor for name, tensor in of.items() if name != "labels"}


def logits_of(output: Any) -> Tensor:
    """The logits of a model that returns a tensor, or of one that returns a structure."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def compile_step(kind: str, method: str, optimizer: str = "adamw(lr = 1e-2)") -> tuple[nn.Module, Any]:
    """The model, and a step that adapts it with the method's defaults at a rank that every site admits."""
    model, pattern = build(kind)
    rank = "rank = 3" if "rank" in parameters(method) else ""
    program = surgery.parse(f"""
        adapt {pattern} {{ with {method}({rank}) }}
        step {{ optimizer = {optimizer}  batch = 4  steps = 6  loss = cross_entropy  seed = 3  compile = off }}
    """)
    return model, surgery.compile(program, model=model, example_inputs=inputs(batch(kind)))


def parameters(method: str) -> str:
    """The line of the method's file that names it and its parameters."""
    text = (files("surgery") / "methods" / f"{method}.surg").read_text()
    return text[text.index(f"method {method}(") :].partition("{")[0]


def disturb(step: Any) -> None:
    """Move every trained tensor of the method off its start."""
    generator = torch.Generator().manual_seed(9)
    trained = {tensor.name for site in step.plan.sites for tensor in site.tensors if tensor.role == "train"}
    with torch.no_grad():
        for tensors in step.parameters_by_site.values():
            for name in trained & set(tensors):
                tensors[name].add_(0.2 * torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64))


def test_the_start_equals_the_base_where_the_plan_says_so(kind: str, method: str) -> None:
    model, step = compile_step(kind, method)
    for site in step.plan.sites:
        assert site.facts.identity_at_start, f"{method} is said to change the model before it is trained"
    for rows in (4, 2):
        example = inputs(batch(kind, seed=rows, rows=rows))
        with torch.no_grad():
            torch.testing.assert_close(logits_of(step.forward(**example)), logits_of(model.eval()(**example)))


def test_merging_equals_the_forward(kind: str, method: str) -> None:
    model, step = compile_step(kind, method)
    disturb(step)
    merged, example = step.merge(), inputs(batch(kind))
    assert type(merged) is type(model) and [n for n, _ in merged.named_parameters()] == [
        n for n, _ in model.named_parameters()
    ]
    with torch.no_grad():
        adapted = logits_of(step.forward(**example))
        torch.testing.assert_close(logits_of(merged.eval()(**example)), adapted, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(adapted, logits_of(model.eval()(**example)))
        for site in step.plan.sites:
            expected = merged.get_parameter(f"{site.path}.weight")
            torch.testing.assert_close(step.effective_weight(site.path), expected)


def test_training_lowers_the_loss_and_leaves_the_rest_alone(kind: str, method: str) -> None:
    model, step = compile_step(kind, method)
    before = copy.deepcopy(model.state_dict())
    start = {
        (path, name): tensor.detach().clone()
        for path, tensors in step.parameters_by_site.items()
        for name, tensor in tensors.items()
    }
    losses = [float(step(batch(kind)).loss) for _ in range(6)]
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():  # the model that was given is never touched
        assert torch.equal(tensor, before[name])
    for site in step.plan.sites:
        for tensor in site.tensors:
            moved = not torch.equal(start[site.path, tensor.name], step.parameters_by_site[site.path][tensor.name])
            assert moved == (tensor.role == "train"), f"{site.path}.{tensor.name} is {tensor.role}"
    merged = dict(step.merge().named_parameters())
    adapted = {f"{site.path}.weight" for site in step.plan.sites}
    for name in set(before) & set(merged) - adapted:
        assert torch.equal(merged[name], before[name])


def test_the_plan_counts_what_is_there(kind: str, method: str) -> None:
    model, step = compile_step(kind, method)
    trained = 0
    for site in step.plan.sites:
        found = step.parameters_by_site[site.path]
        assert set(found) == {tensor.name for tensor in site.tensors}
        for tensor in site.tensors:
            assert tuple(found[tensor.name].shape) == tensor.shape
            assert found[tensor.name].numel() == tensor.numbers
        assert site.shape == tuple(model.get_parameter(f"{site.path}.weight").shape)
        trained += sum(tensor.numbers for tensor in site.tensors if tensor.role == "train")
    assert step.plan.totals.trainable == trained
    assert step.plan.totals.model == sum(parameter.numel() for parameter in model.parameters())


def test_a_state_continues_where_it_was_taken(kind: str, method: str) -> None:
    _, step = compile_step(kind, method)
    for seed in range(3):
        step(batch(kind, seed))
    state = copy.deepcopy(step.state_dict())
    expected = [float(step(batch(kind, seed)).loss) for seed in range(3, 6)]
    _, again = compile_step(kind, method)
    again.load_state_dict(state)
    assert [float(again(batch(kind, seed)).loss) for seed in range(3, 6)] == expected
    for path, tensors in step.parameters_by_site.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, again.parameters_by_site[path][name])


def test_saved_and_loaded_steps_are_equal(kind: str, method: str, tmp_path: Path) -> None:
    model, step = compile_step(kind, method)
    step(batch(kind))
    step.save(tmp_path / "run")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in {".pt", ".pth", ".pkl", ".bin"}]
    loaded = surgery.load(tmp_path / "run", model=model, example_inputs=inputs(batch(kind)))
    example = inputs(batch(kind, seed=5))
    with torch.no_grad():
        assert torch.equal(logits_of(step.forward(**example)), logits_of(loaded.forward(**example)))


def test_gradients_equal_those_of_the_merged_weight(kind: str, method: str) -> None:
    """A step of plain SGD moves each trained tensor by the derivative of the loss at the effective weight.

    Directional derivatives by central differences: no part of the compiler but `merge` takes part in them.
    """
    model, step = compile_step(kind, method, "sgd(lr = 1.0)")
    disturb(step)
    trained = {tensor.name for site in step.plan.sites for tensor in site.tensors if tensor.role == "train"}
    frozen_norm = method == "dora"  # the norm's gradient is stopped: differences would see it
    start = copy.deepcopy(step.state_dict())

    def loss() -> float:
        weights = dict(step.merge().named_parameters())
        with torch.no_grad():
            output = functional_call(model.eval(), weights, (), inputs(batch(kind)))
            return float(F.cross_entropy(logits_of(output), batch(kind)["labels"]))

    numeric: dict[tuple[str, str], float] = {}
    directions: dict[tuple[str, str], Tensor] = {}
    generator = torch.Generator().manual_seed(4)
    site = step.plan.sites[0]
    for name in sorted(trained - ({"A", "B"} if frozen_norm else set())):
        tensor = step.parameters_by_site[site.path][name]
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(sign * 1e-5 * direction)
            values.append(loss())
            with torch.no_grad():
                tensor.add_(-sign * 1e-5 * direction)
        directions[site.path, name] = direction
        numeric[site.path, name] = (values[0] - values[1]) / 2e-5
    step.load_state_dict(start)
    before = {name: tensor.detach().clone() for name, tensor in step.parameters_by_site[site.path].items()}
    step(batch(kind))
    for (path, name), expected in numeric.items():
        moved = before[name] - step.parameters_by_site[path][name].detach()
        assert float((moved * directions[path, name]).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-8)
