"""AdaLoRA: its budget curve, the count at the end, and every step beside peft's."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor

import surgery
from surgery.compiler.kernels.schedules import cubic_budget
from tests.surgery.three_layers import ThreeLayers, batch

RATE, STEPS, WARMUP, COOLDOWN, INTERVAL = 0.05, 24, 4, 6, 3


class WithLoss(ThreeLayers):
    """What peft asks of a model: a config, and a loss where there are labels."""

    config = SimpleNamespace(model_type="custom", use_return_dict=True)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """Outputs, or with `labels` the loss of them too."""
        found = super().forward(x)
        return found if labels is None else SimpleNamespace(loss=(found - labels).square().mean(), logits=found)


def ours(optimizer: str = f"adamw(lr = {RATE})", **settings: Any) -> Any:
    more = "".join(f", {name} = {value}" for name, value in settings.items())
    text = f"""
        adapt * : Linear {{ with adalora(rank = 5, target = 2, alpha = 4, orth = 0.5, warmup = {WARMUP},
                                         cooldown = {COOLDOWN}, interval = {INTERVAL}{more}) }}
        step {{ optimizer = {optimizer}  loss = mse  batch = 8  steps = {STEPS} }}
    """
    return surgery.compile(surgery.parse(text), model=ThreeLayers(), example_inputs={"x": batch(0)["x"]})


def test_every_step_is_that_of_peft() -> None:
    """Scores of gradients after the step, the penalty over all sites' tensors, the mask of the end put on again."""
    step = ours()
    config = peft.AdaLoraConfig(
        target_r=2, init_r=5, lora_alpha=4, tinit=WARMUP, tfinal=COOLDOWN, deltaT=INTERVAL, beta1=0.85, beta2=0.85,
        orth_reg_weight=0.5, total_step=STEPS, target_modules=["first", "second", "third"],
    )  # fmt: skip
    model: Any = peft.get_peft_model(WithLoss(), config)
    layers = {path: getattr(model.base_model.model, path) for path in step.parameters_by_site}
    names = {"Q": "lora_A", "P": "lora_B", "E": "lora_E"}

    def theirs(path: str, name: str) -> Tensor:
        tensor: Tensor = getattr(layers[path], names[name])["default"]
        return tensor.flatten() if name == "E" else tensor

    with torch.no_grad():
        for path, tensors in step.parameters_by_site.items():
            for name in names:
                theirs(path, name).copy_(tensors[name].view_as(theirs(path, name)))
    # peft lets the optimizer move `ranknum` too, the rank that the scale divides by: an oversight
    trained = [one for name, one in model.named_parameters() if one.requires_grad and "ranknum" not in name]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    for number in range(STEPS):
        own = batch(number)
        loss = model.base_model(**own).loss  # which adds the penalty
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(number)
        optimizer.zero_grad()
        result = step(own)
        assert float(result.loss + result.penalty) == pytest.approx(float(loss.detach()), rel=1e-9), number
        for path, tensors in step.parameters_by_site.items():
            for name in names:
                torch.testing.assert_close(tensors[name].detach(), theirs(path, name).detach(), rtol=1e-8, atol=1e-10)
        if number >= STEPS - COOLDOWN:
            left = sum(int(tensors["E"].count_nonzero()) for tensors in step.parameters_by_site.values())
            assert left == 2 * 3


def test_the_budget_is_the_published_curve() -> None:
    """72 matrices from 12 to 8 over 1000 steps: numbers of the paper's schedule, and peft's at every step."""
    found = {step: int(72 * cubic_budget(step, 1000, 12, 8, 100, 200)) for step in range(1000)}
    assert [found[step] for step in (0, 100, 200, 400, 600, 800, 999)] == [864, 864, 757, 629, 582, 576, 576]
    config = peft.AdaLoraConfig(init_r=12, target_r=8, tinit=100, tfinal=200, deltaT=1, total_step=1000)
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.peft_config, allocator.init_bgt, allocator.target_bgt = config, 864, 576
    assert found == {step: allocator.budget_schedule(step)[0] for step in range(1000)}


def test_what_is_masked_leaves_the_change_by_just_that_triple() -> None:
    step = ours()
    for number in range(STEPS):
        step(batch(number))
    for path, tensors in step.parameters_by_site.items():
        kept = tensors["E"] != 0
        change = 4 / (5 + 1e-5) * (tensors["P"][:, kept] * tensors["E"][kept]) @ tensors["Q"][kept]
        weight = getattr(ThreeLayers(), path).weight + change
        torch.testing.assert_close(step.effective_weight(path), weight.detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(kept.double(), tensors["kept"])


@pytest.mark.parametrize("interrupted", [3, 11, 20])
def test_a_run_that_was_interrupted_goes_on_to_the_bit(interrupted: int, tmp_path: Any) -> None:
    whole, broken = ours(), ours()
    for number in range(STEPS):
        whole(batch(number))
    for number in range(interrupted):
        broken(batch(number))
    broken.save(tmp_path / "run")
    loaded = surgery.load(tmp_path / "run", model=ThreeLayers(), example_inputs={"x": batch(0)["x"]})
    loaded.steps = STEPS
    for number in range(interrupted, STEPS):
        loaded(batch(number))
    expected = whole.state_dict()["weights"]
    assert {"first.E_sensitivity", "first.P_uncertainty", "first.kept", "first.score"} <= expected.keys()
    for name, tensor in loaded.state_dict()["weights"].items():
        assert torch.equal(tensor, expected[name]), name


def test_a_rank_that_falls_keeps_its_scale_and_its_shape() -> None:
    step = ours()
    before = copy.deepcopy({name: tensor.shape for name, tensor in step.state_dict()["weights"].items()})
    for number in range(STEPS):
        step(batch(number))
    assert {name: tensor.shape for name, tensor in step.state_dict()["weights"].items()} == before
    assert {event.update for event in step.plan.events} == {"assign", "mask"}
