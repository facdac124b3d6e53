"""`penalty = ...`: what a method adds to the loss of a step, against the same written out with autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import surgery

RATE = 0.1
LOW_RANK = "A = train normal(0.5)[rank, in]\nB = train normal(0.5)[out, rank]\ndelta = B @ A\n"
ORTHOGONAL = "penalty = 0.3 / sites * fro(A @ A.T - eye(rank))"


class Two(nn.Module):
    """Two linears of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


def compiled(methods: str, rule: str = "with m()", settings: str = "", model: nn.Module | None = None) -> Any:
    text = f"{methods}\nadapt {{first,second}} {{ {rule} }}\n"
    text += f"step {{ optimizer = sgd(lr = {RATE})  loss = mse  batch = 4  steps = 4  {settings} }}"
    return surgery.compile(surgery.parse(text), model=model or Two(), example_inputs={"x": batch()["x"]})


def method(penalty: str, name: str = "m", tensors: str = LOW_RANK) -> str:
    return f"method {name}(rank: int = 2) {{\n{tensors}{penalty}\n}}"


def batch(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"x": (4, 5), "labels": (4, 3)}
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


def stepped(
    step: Any, penalty: Callable[[dict[str, Tensor]], Tensor], clip: float | None = None
) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, penalty, and trained tensors after one step of plain SGD, all by autograd."""
    sites = step.parameters_by_site
    leaves = {
        f"{path}.{name}": tensor.detach().clone().requires_grad_()
        for path, tensors in sites.items() for name, tensor in tensors.items()
    }  # fmt: skip
    model, own = Two(), batch()
    weights = [
        getattr(model, path).weight.detach() + leaves[f"{path}.B"] @ leaves[f"{path}.A"] for path in ("first", "second")
    ]
    hidden = torch.tanh(own["x"] @ weights[0].T + model.first.bias.detach())
    loss = (hidden @ weights[1].T + model.second.bias.detach() - own["labels"]).square().mean()
    added = penalty(leaves)
    (loss + added).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(leaves.values(), clip)
    moved = {name: (leaf - RATE * leaf.grad).detach() for name, leaf in leaves.items() if leaf.grad is not None}
    return float(loss), float(added), moved


def orthogonal(leaves: dict[str, Tensor]) -> Tensor:
    eye = torch.eye(2, dtype=torch.float64)
    return 0.15 * sum(
        ((a @ a.T - eye).square().sum().sqrt() for a in (leaves["first.A"], leaves["second.A"])), torch.zeros(())
    )


@pytest.mark.parametrize("settings", ["", "micro_batch = 1", "clip = 0.05", "micro_batch = 3  clip = 0.05"])
def test_a_step_is_that_of_loss_and_penalty_together(settings: str) -> None:
    """Once per step, whatever the micro-batches; clipped with the rest; reported apart from the loss."""
    step = compiled(method(ORTHOGONAL), settings=settings)
    loss, added, moved = stepped(step, orthogonal, 0.05 if "clip" in settings else None)
    result = step(batch())
    assert float(result.loss) == pytest.approx(loss, rel=1e-12)
    assert float(result.penalty) == pytest.approx(added, rel=1e-12)
    for name, value in moved.items():
        torch.testing.assert_close(step.weights[name].detach(), value, rtol=1e-12, atol=1e-14)


def test_the_clock_is_an_input_of_the_penalty() -> None:
    """`max(0, min(1, 2 - step))` is one until step 2, then nothing."""
    step = compiled(method("penalty = max(0, min(1, 2 - step)) * sum(A ** 2) * (1 + step / steps)"))
    for number, factor in enumerate((1.0, 1.25, 0.0, 0.0)):
        squares = sum(float(step.weights[f"{path}.A"].detach().square().sum()) for path in ("first", "second"))
        assert float(step(batch(number)).penalty) == pytest.approx(factor * squares, rel=1e-12)


def test_what_reads_shared_tensors_alone_counts_once() -> None:
    shared = LOW_RANK.replace("[rank, in]", "[rank, max_in] shared by model").replace("B @ A", "B @ A[:, 0:in]")
    step = compiled(method("penalty = sum(A ** 2)", tensors=shared))
    squares = float(step.weights["shared.rule0.A"].detach().square().sum())
    assert float(step(batch()).penalty) == pytest.approx(squares, rel=1e-12)


def test_parts_of_a_composition_keep_their_penalties() -> None:
    methods = method("penalty = sum(A ** 2)") + "\n" + method("penalty = 3 * sum(B ** 2)", "n")
    step = compiled(methods, rule="with m() + 2 * n()")
    expected = 0.0
    for path in ("first", "second"):
        expected += float(step.weights[f"{path}.m.A"].detach().square().sum())
        expected += 3 * float(step.weights[f"{path}.n.B"].detach().square().sum())
    assert float(step(batch()).penalty) == pytest.approx(expected, rel=1e-12)


def test_a_penalty_may_read_the_weight() -> None:
    step = compiled(method("penalty = sum((W * delta) ** 2)"))
    model, expected = Two(), 0.0
    for path in ("first", "second"):
        tensors = step.parameters_by_site[path]
        expected += float((getattr(model, path).weight * (tensors["B"] @ tensors["A"])).square().sum())
    assert float(step(batch()).penalty) == pytest.approx(expected, rel=1e-12)


def test_a_penalty_that_is_not_finite_changes_nothing() -> None:
    step = compiled(method("penalty = 1e200 * sum(exp(A * 1e6))"))
    before = {name: tensor.detach().clone() for name, tensor in step.state_dict()["weights"].items()}
    result = step(batch())
    assert not result.taken and not torch.isfinite(result.loss), "who looks at the loss alone has to see it"
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.state_dict()["weights"].items())


def test_evaluation_is_without_it() -> None:
    plain, penalised = compiled(method("")), compiled(method(ORTHOGONAL))
    assert float(penalised.evaluate_loss(batch())[0]) == float(plain.evaluate_loss(batch())[0])


def test_the_penalties_of_kasa_equal_peft_s() -> None:
    model = Two()
    adapted: Any = peft.get_peft_model(
        Two(), peft.LoraConfig(r=2, lora_alpha=4, kasa_config=peft.KasaConfig(0.3, 0.7), target_modules="first|second")
    )  # fmt: skip
    step = compiled("", rule="with kasa(rank = 2, alpha = 4, beta = 0.3, gamma = 0.7)", model=model)
    with torch.no_grad():
        for path, tensors in step.parameters_by_site.items():
            layer = getattr(adapted.base_model.model, path)
            layer.lora_B["default"].weight.normal_()
            tensors["A"].copy_(layer.lora_A["default"].weight)
            tensors["B"].copy_(layer.lora_B["default"].weight)
            tensors["d"].copy_(layer.lora_diag["default"])
    expected = float(adapted.base_model._get_kasa_loss())  # in float32
    assert float(step(batch()).penalty) == pytest.approx(expected, rel=1e-5)
