"""Events, penalties and noise on a CUDA device: the host waits for none of them, and masks are those of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.compiler.kernels.noise import bernoulli, gaussian
from tests.surgery import three_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE, STEPS = "cuda" if torch.cuda.is_available() else "cpu", 12
SIZES = (48, 64, 56, 40)
RULES = [
    "with adalora(rank = 4, target = 2, warmup = 2, cooldown = 3, interval = 2)",
    "with sora(rank = 4, threshold = 0.05, l1 = 0.1)",
    "with relora(rank = 4, period = 3)",
    "with xgblora(period = 3, decay = 0.01)  active = random(2, every = 3)",
    "with dora_dynamic(rank = 4, target = 2, interval = 2)",
    "with lora2(rank = 4, target = 2, width = 4, warmup = 2, cooldown = 3, interval = 2)",
    "with flat_lora(rank = 4, rho = 0.5)",
    "with rm_lora(rank = 4)",
]


def batch(number: int, device: str) -> dict[str, Tensor]:
    """16 rows on the device."""
    return {name: tensor.to(device) for name, tensor in three_layers.batch(number, 16, SIZES, torch.float32).items()}


def compiled(rule: str, device: str, how: str) -> Any:
    text = f"adapt * : Linear {{ {rule} }}\n"
    text += (
        f"step {{ optimizer = adamw(lr = 0.01)  loss = mse  batch = 16  steps = {STEPS}  clip = 1.0  compile = {how} }}"
    )
    model = three_layers.ThreeLayers(SIZES, torch.float32).to(device)
    return surgery.compile(surgery.parse(text), model, {"x": batch(0, device)["x"]}, device=device)


@pytest.mark.parametrize("rule", RULES)
def test_the_host_waits_for_no_event(rule: str) -> None:
    step = compiled(rule, DEVICE, "off")
    for number in range(STEPS):
        ready = batch(number, DEVICE)
        if DEVICE == "cuda" and number > 0:  # the first step makes what is made once
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(ready)
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("how", ["off", "on"])
@pytest.mark.parametrize("rule", RULES)
def test_the_losses_are_those_of_the_cpu(rule: str, how: str) -> None:
    """Before scores of rounding noise decide differently: the first steps."""
    steps = compiled(rule, DEVICE, how), compiled(rule, "cpu", "off")
    for number in range(4):
        found, expected = (
            float(step(batch(number, device)).loss) for step, device in zip(steps, (DEVICE, "cpu"), strict=True)
        )
        assert found == pytest.approx(expected, rel=2e-4), number


def test_noise_is_that_of_the_cpu() -> None:
    like, key = torch.zeros(()), torch.tensor(2**61 + 17)
    here, there = (gaussian(like.to(device), key.to(device), 5, [300, 200]).cpu() for device in ("cpu", DEVICE))
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    masks = [bernoulli(like.to(device), key.to(device), 5, 0.5, [300, 200]).cpu() for device in ("cpu", DEVICE)]
    assert torch.equal(*masks)
