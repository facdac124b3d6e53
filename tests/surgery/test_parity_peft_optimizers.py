"""The optimizers that peft has too, over 20 steps: LoRA+, Riemannian preconditioning and LoRA-FA, in float64."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer

from tests.surgery.optimizers import RANK, SITES, Network, batch, put, step_of

ALPHA, STEPS = 6, 20


def peft_model(step: Any) -> Any:
    """peft's LoRA on the same network, with the step's factors as they are now."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(SITES))
    model = peft.get_peft_model(Network(), config)
    with torch.no_grad():
        for path, tensors in step.parameters_by_site.items():
            layer: Any = model.get_submodule(f"base_model.model.{path}")
            layer.lora_A["default"].weight.copy_(tensors["A"])
            layer.lora_B["default"].weight.copy_(tensors["B"])
            assert layer.lora_A["default"].weight.dtype == torch.float64
    return model


def follow(step: Any, model: Any, optimizer: torch.optim.Optimizer, bound: float) -> None:
    """Take the same steps on both sides, and compare all factors after each."""
    for number in range(STEPS):
        data = batch(seed=number)
        optimizer.zero_grad()
        loss = F.mse_loss(model(data["x"]), data["labels"])
        torch.autograd.backward(loss)
        optimizer.step()
        assert float(step(data).loss) == pytest.approx(float(loss.detach()), rel=1e-10)
        for path, tensors in step.parameters_by_site.items():
            layer: Any = model.get_submodule(f"base_model.model.{path}")
            for mine, theirs in ((tensors["A"], layer.lora_A), (tensors["B"], layer.lora_B)):
                torch.testing.assert_close(mine.detach(), theirs["default"].weight.detach(), rtol=bound, atol=bound)


@pytest.mark.parametrize("start", ["zero", "full"])
def test_lora_plus(start: str) -> None:
    step = step_of("lora_plus(adamw(lr = 2e-3, weight_decay = 0.1), ratio = 8)")
    if start == "full":
        put(step)
    model = peft_model(step)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    follow(step, model, optimizer, 1e-10)


@pytest.mark.parametrize("start", ["zero", "full"])
@pytest.mark.parametrize(
    ("ours", "kind", "options"),
    [
        ("adamw(lr = 2e-3, weight_decay = 0.1)", torch.optim.AdamW, {"weight_decay": 0.1}),
        ("sgd(lr = 0.02, momentum = 0.5)", torch.optim.SGD, {"momentum": 0.5}),
    ],
)
def test_riemannian(ours: str, kind: Any, options: dict[str, float], start: str) -> None:
    step = step_of(f"riemannian({ours}, damping = 0.01)")
    if start == "full":
        put(step)
    model = peft_model(step)
    lr = step.plan.step.optimizer.lr
    follow(step, model, create_riemannian_optimizer(model, kind, lr=lr, reg=0.01, **options), 1e-9)


@pytest.mark.parametrize("start", ["zero", "full"])
def test_lora_fa(start: str) -> None:
    # peft adds eps to the root before it is corrected, torch after it: without eps both are the same
    step = step_of(
        "lora_fa(adamw(lr = 2e-3, eps = 1e-300), damping = 1e-8)", f"lora_fa(rank = {RANK}, alpha = {ALPHA})"
    )
    if start == "full":
        put(step)
    model = peft_model(step)
    optimizer = create_lorafa_optimizer(model, r=RANK, lora_alpha=ALPHA, lr=2e-3)
    for group in optimizer.param_groups:
        group["eps"] = 1e-300
    follow(step, model, optimizer, 1e-9)
