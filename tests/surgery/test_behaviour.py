"""What every method of the library has to do, whatever its equation.

A new file in `surgery/methods` is tested by this matrix without an edit here: where it is put is read off the spec that
uses it, what it computes off the function of its name in `references/`, and what holds for it off the plan's own facts.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import surgery
from surgery.peft.write import export

RATE = 0.05  # of the cases' plain SGD


def logits_of(output: Any) -> Tensor:
    """The logits of a model that returns a tensor, or of one that returns a structure."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def test_the_start_equals_the_base_where_the_plan_says_so(case: Any) -> None:
    unchanged = all(site.facts.identity_at_start for site in case.step.plan.sites)
    for rows in (4, 2):
        base, adapted = case.base(case.inputs(rows, rows)), case.forward(case.inputs(rows, rows))
        if unchanged:
            torch.testing.assert_close(adapted, base)
        else:
            assert float((adapted - base).abs().max()) > 1e-9, "the plan says that the start differs, and it does not"


def test_weight_and_forward_equal_the_reference(case: Any) -> None:
    case.disturb()
    reference = case.reference()
    for site in case.step.plan.sites:
        expected = reference.weight(site.path)
        if expected is not None:
            torch.testing.assert_close(case.step.effective_weight(site.path), expected[0], rtol=1e-9, atol=1e-10)
            if expected[1] is not None:
                torch.testing.assert_close(case.step.effective_bias(site.path), expected[1], rtol=1e-9, atol=1e-10)
    inputs = case.inputs(3, 7)
    with torch.no_grad():
        adapted = case.forward(inputs)
        torch.testing.assert_close(adapted, reference(inputs), rtol=1e-8, atol=1e-9)
    assert not torch.allclose(adapted, case.base(inputs))


def test_merging_equals_the_forward_or_is_refused(case: Any) -> None:
    case.disturb()
    if not all(site.facts.merges for site in case.step.plan.sites):
        with pytest.raises(surgery.SurgError, match=case.method):
            case.step.merge()
        return
    merged = case.step.merge().eval()
    assert type(merged) is type(case.model)
    names = [name for name, _ in case.model.named_parameters()]
    found = [name for name, _ in merged.named_parameters()]
    assert [name for name in found if name in names] == names
    assert {name.rpartition(".")[2] for name in set(found) - set(names)} <= {"bias"}
    inputs = case.inputs()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(merged(**inputs)), case.forward(inputs), rtol=1e-8, atol=1e-9)
    adapted = {site.path for site in case.step.plan.sites}
    for name, tensor in case.model.named_parameters():
        if name.rpartition(".")[0] not in adapted:
            assert torch.equal(merged.get_parameter(name), tensor)


def test_exporting_equals_the_forward_or_is_refused(case: Any, tmp_path: Path) -> None:
    """As a LoRA or a DoRA that peft loads and merges, by algebra alone; a delta with a proved rank always exports."""
    case.disturb()
    for seed in range(3):
        case.step(case.batch(seed))
    try:
        export(case.step, tmp_path, tmp_path / "adapter", torch.float64)
    except surgery.SurgError as error:
        assert not all(site.facts.exports_as_lora for site in case.step.plan.sites)
        assert {found.code for found in error.diagnostics} == {"SURG064"} and case.method in str(error)
        return
    base = copy.deepcopy(case.model)
    if isinstance(base.config, SimpleNamespace):
        del base.config  # peft asks a config for its `get`
    adapted: Any = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = case.inputs()
    expected = case.forward(inputs)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(adapted(**inputs)), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(logits_of(adapted.merge_and_unload()(**inputs)), expected, rtol=1e-10, atol=1e-10)
    assert float((expected - case.base(inputs)).abs().max()) > 1e-3


def test_gradients_equal_those_of_the_reference(case: Any) -> None:
    """One step of plain SGD moves each trained tensor by the gradient of the loss."""
    case.disturb()
    reference = case.reference()
    penalty = reference.penalty()
    (case.loss(reference(case.inputs())) + penalty).backward()
    before = {key: tensor.detach().clone() for key, tensor in case.tensors().items()}
    torch.testing.assert_close(case.step(case.batch()).penalty.double(), penalty.detach(), rtol=1e-9, atol=1e-12)
    lr = {tensor.key: tensor.lr for site in case.step.plan.sites for tensor in site.tensors}
    for key, leaf in reference.trained.items():
        if key in case.assigned(0):  # an event has moved it too
            continue
        moved = (before[key] - case.tensors()[key].detach()) / (lr[key] or RATE)
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        scale = float(expected.abs().max())
        torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-8 + 1e-7 * scale)
    assert any(leaf.grad is not None and bool(leaf.grad.any()) for leaf in reference.trained.values())


def test_gradients_equal_central_differences(case: Any) -> None:
    """Directional derivatives of the whole forward, where the paper's gradient is that of the value."""
    if re.search(r"\b(stop|surrogate)\(", case.text):
        return  # the gradient is not that of the value, by intention: the test above compares it
    case.disturb()
    generator = torch.Generator().manual_seed(4)
    start = case.snapshot()
    trained = {key: tensor for key, tensor in case.tensors(role="train").items() if key not in case.assigned(0)}
    total = sum(tensor.numel() for tensor in trained.values()) ** 0.5
    directions = {
        key: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / total
        for key, tensor in trained.items()
    }
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for key, tensor in trained.items():
                tensor.add_(sign * 1e-5 * directions[key])
            values.append(float(case.loss(case.forward(case.inputs())) + case.reference().penalty()))
        case.step.load_state_dict(copy.deepcopy(start))
    before = {key: tensor.detach().clone() for key, tensor in trained.items()}
    case.step(case.batch())
    lr = {tensor.key: tensor.lr or RATE for site in case.step.plan.sites for tensor in site.tensors}
    slope = sum(
        float(((before[key] - tensor.detach()) / lr[key] * directions[key]).sum()) for key, tensor in trained.items()
    )
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-8)


def test_training_lowers_the_loss_and_leaves_the_rest_alone(case: Any) -> None:
    before = copy.deepcopy(case.model.state_dict())
    start = {key: tensor.detach().clone() for key, tensor in case.tensors().items()}
    base = {name: tensor.detach().clone() for name, tensor in case.base_weights().items()}
    losses = [float(case.step(case.batch()).loss) for _ in range(6)]
    assert losses[-1] < losses[0]
    for name, tensor in case.model.state_dict().items():  # the model that was given is never touched
        assert torch.equal(tensor, before[name])
    trained, states = set(case.tensors(role="train")), set(case.tensors(role="state"))
    for key in start.keys() - states - case.assigned(*range(6)):  # those are what events make of them
        assert torch.equal(start[key], case.tensors()[key]) == (key not in trained), key
    moved = {name for name, tensor in case.base_weights().items() if not torch.equal(base[name], tensor)}
    assert moved == {
        site.parameter for site in case.step.plan.sites if site.facts.moves_base and site.update == "literal"
    }


def test_the_plan_counts_what_is_there(case: Any) -> None:
    plan, trained = case.step.plan, {}
    for site in plan.sites:
        found = case.step.parameters_by_site[site.path]
        assert set(found) == {tensor.name for tensor in site.tensors}
        for tensor in site.tensors:
            assert tuple(found[tensor.name].shape) == tensor.shape
            assert found[tensor.name].numel() == tensor.numbers
            if tensor.role == "train":
                trained[tensor.key] = tensor.numbers
    assert plan.totals.trainable == sum(trained.values())
    assert plan.totals.model == sum(parameter.numel() for parameter in case.model.parameters())


def test_a_saved_run_continues_where_it_was(case: Any, tmp_path: Path) -> None:
    for seed in range(2):
        case.step(case.batch(seed))
    case.step.save(tmp_path / "run")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in {".pt", ".pth", ".pkl", ".bin"}]
    loaded = surgery.load(tmp_path / "run", model=case.model, example_inputs=case.inputs())
    inputs = case.inputs(4, 5)
    with torch.no_grad():
        assert torch.equal(logits_of(loaded.forward(**inputs)), case.forward(inputs))
    expected = [float(case.step(case.batch(seed)).loss) for seed in (2, 3)]
    assert [float(loaded(case.batch(seed)).loss) for seed in (2, 3)] == expected
    for path, tensors in case.step.parameters_by_site.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, loaded.parameters_by_site[path][name])


def test_bfloat16_stays_close(half: tuple[Tensor, Tensor]) -> None:
    """Weights and activations have 8 bits: the logits are right to 3 % of their size."""
    found, expected = half
    assert float((found - expected).norm()) <= 0.03 * float(expected.norm())


def test_every_strategy_computes_the_same(mlp: Any) -> None:
    """Each strategy that is legal at all sites, forward and backward, against the one that was chosen."""
    legal = [{found.strategy for found in site.candidates if found.legal} for site in mlp.step.plan.sites]
    mlp.disturb()
    inputs, before = mlp.inputs(), {key: tensor.detach().clone() for key, tensor in mlp.tensors().items()}
    expected = mlp.forward(inputs)
    mlp.step(mlp.batch())
    for strategy in sorted(set.intersection(*legal)):
        other = mlp.compile(mlp.model, strategy)
        assert {site.strategy for site in other.plan.sites} == {strategy}
        with torch.no_grad():
            for site in other.plan.sites:
                for tensor in site.tensors:
                    other.parameters_by_site[site.path][tensor.name].copy_(before[tensor.key])
            torch.testing.assert_close(logits_of(other.forward(**inputs)), expected, rtol=1e-9, atol=1e-9)
        other(mlp.batch())
        for site in other.plan.sites:
            for tensor in site.tensors:
                found = other.parameters_by_site[site.path][tensor.name]
                torch.testing.assert_close(found, mlp.tensors()[tensor.key], rtol=1e-7, atol=1e-8)
