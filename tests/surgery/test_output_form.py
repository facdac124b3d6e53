"""The `output` form and general inputs against plain torch in float64, in both scopes: values, training, merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery

pytestmark = pytest.mark.usefixtures("captured_once")

METHODS = """
method bottleneck(width: int = 3) {
    D = train normal(0.5)[width, out];  d = train normal(0.5)[width];  U = train normal(0.5)[out, width]
    output = y + gelu(y @ D.T + d) @ U.T
}
method shift() {
    w = train ones[out];  c = train normal(1.0)[out]
    output = w * y + c
}
method parallel(width: int = 2) {
    A = train normal(0.5)[width, in];  B = train normal(0.5)[out, width]
    output = y + tanh(x @ A.T) @ (B.T @ (W @ W.T))
}
method spread() {
    a = train normal(0.5)[out];  v = train normal(0.5)[out]
    output = (y + relu(y @ circ(a).T)) * sigmoid(v) - softmax(y) / 2
}
method weighted(rank: int = 2) {
    A = train normal(0.5)[rank, in];  B = train normal(0.5)[out, rank];  s = train ones[in]
    weight = 0.5 * W + B @ A
    input = (x - s) * s
}
"""


def reference(method: str, x: Tensor, layer: nn.Linear, t: dict[str, Tensor]) -> Tensor:
    W, y = layer.weight, F.linear(x, layer.weight, layer.bias)
    if method == "bottleneck":
        return y + F.gelu(y @ t["D"].T + t["d"]) @ t["U"].T
    if method == "shift":
        return t["w"] * y + t["c"]
    if method == "parallel":
        return y + torch.tanh(x @ t["A"].T) @ t["B"].T @ W @ W.T
    if method == "weighted":
        return y + ((x - t["s"]) * t["s"]) @ (0.5 * W + t["B"] @ t["A"] - W).T
    rows = torch.stack([t["a"].roll(shift) for shift in range(len(t["a"]))], dim=1)
    return (y + F.relu(y @ rows.T)) * torch.sigmoid(t["v"]) - torch.softmax(y, -1) / 2


NAMES = ("bottleneck", "shift", "parallel", "spread", "weighted")


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7, bias=bias, dtype=dtype), nn.Linear(7, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


def program(method: str) -> surgery.Program:
    step = "step { optimizer = sgd(lr = 0.1)  batch = 3  loss = mse  compile = off }"
    return surgery.parse(f"{METHODS}\nadapt first {{ with {method}() }}\n{step}")


def batch(shape: tuple[int, ...] = (3, 2, 5)) -> dict[str, Tensor]:
    return {"x": torch.randn(*shape, dtype=torch.float64), "labels": torch.randn(*shape[:-1], 4, dtype=torch.float64)}


def leaves(step: Any) -> dict[str, Tensor]:
    tensors = step.parameters_by_site["first"].items()
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors}


@pytest.mark.parametrize("method", NAMES)
def test_compiled_values_and_gradients(method: str) -> None:
    model, data = Model(), batch()
    step = surgery.compile(program(method), model, {"x": data["x"]})
    t = leaves(step)
    expected = model.second(torch.tanh(reference(method, data["x"], model.first, t)))
    torch.testing.assert_close(step.forward(x=data["x"]), expected.detach(), rtol=1e-11, atol=1e-12)
    (expected - data["labels"]).square().mean().backward()
    step(data)
    for name, tensor in step.parameters_by_site["first"].items():
        torch.testing.assert_close(tensor.detach(), t[name].detach() - 0.1 * t[name].grad, rtol=1e-9, atol=1e-11)  # type: ignore[operator]


@pytest.mark.parametrize("method", NAMES)
def test_module_scope_values_gradients_and_state(method: str) -> None:
    base, adapted, data = Model(), Model(), batch()
    adapted.load_state_dict(base.state_dict())
    surgery.apply(program(method), adapted)
    t = {name: tensor.detach().clone().requires_grad_() for name, tensor in adapted.first.named_parameters()}
    x = data["x"].clone().requires_grad_()
    expected = base.second(torch.tanh(reference(method, x, base.first, t)))
    torch.testing.assert_close(adapted(data["x"]), expected, rtol=1e-11, atol=1e-12)
    expected.square().sum().backward()
    other = data["x"].clone().requires_grad_()
    adapted(other).square().sum().backward()
    torch.testing.assert_close(other.grad, x.grad, rtol=1e-9, atol=1e-11)
    for name, parameter in adapted.first.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, t[name].grad, rtol=1e-9, atol=1e-11)
    twin = surgery.apply(program(method), Model())
    twin.load_state_dict(adapted.state_dict())
    assert torch.equal(twin(data["x"]), adapted(data["x"]))


@pytest.mark.parametrize("method", ["shift", "weighted"])
def test_affine_ones_merge(method: str) -> None:
    step = surgery.compile(program(method), Model(), {"x": batch()["x"]})
    for _ in range(2):
        step(batch())
    merged = step.merge()
    assert type(merged.first) is nn.Linear
    data = batch()
    torch.testing.assert_close(merged(data["x"]), step.forward(x=data["x"]), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(step.effective_bias("first"), merged.first.bias.detach())


def test_a_bias_that_is_needed_and_not_there() -> None:
    model = Model(bias=False)
    step = surgery.compile(program("shift"), model, {"x": batch()["x"]})
    with pytest.raises(surgery.SurgError, match="needs a bias"):
        step.merge()


@pytest.mark.parametrize("method", ["bottleneck", "parallel", "spread"])
def test_others_say_why_they_do_not_merge(method: str) -> None:
    step = surgery.compile(program(method), Model(), {"x": batch()["x"]})
    (site,) = step.plan.sites
    assert not site.facts.merges and "of an activation is not linear in x" in site.facts.merge_reason
    with pytest.raises(surgery.SurgError, match="is not linear in x") as merging:
        step.merge()
    assert merging.value.diagnostics[0].code == "SURG055"
    for ask in (step.effective_weight, step.effective_bias):
        with pytest.raises(surgery.SurgError, match="is not linear in x") as asked:
            ask("first")
        assert asked.value.diagnostics[0].code == "SURG055"


def test_a_run_is_saved_and_loaded(tmp_path: Path) -> None:
    model = Model()
    step = surgery.compile(program("bottleneck"), model, {"x": batch()["x"]})
    step(batch())
    step.save(tmp_path / "run")
    loaded = surgery.load(tmp_path / "run", model=model, example_inputs={"x": batch()["x"]})
    data = batch()
    assert torch.equal(loaded.forward(x=data["x"]), step.forward(x=data["x"]))
    assert float(step(data).loss) == float(loaded(data).loss)
    attached = Model()
    attached.load_state_dict(model.state_dict())
    surgery.apply(tmp_path / "run", attached)
    assert attached(data["x"]).shape == (3, 2, 4)


class Activated(Model):
    """A model without a config and with a module without a weight."""

    def __init__(self) -> None:
        super().__init__(torch.float64)
        self.activation = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.activation(self.first(x)))
        return found


def test_a_run_knows_the_sizes_of_its_outputs(tmp_path: Path) -> None:
    text = f"{METHODS}\nadapt activation {{ with bottleneck() }}\nstep {{ batch = 3  loss = mse }}"
    model, data = Activated(), batch()
    step = surgery.compile(surgery.parse(text), model, {"x": data["x"]})
    step(data)
    step.save(tmp_path / "run")
    attached = surgery.apply(tmp_path / "run", model)
    torch.testing.assert_close(attached(data["x"]), step.forward(x=data["x"]))


def test_what_is_read_is_what_is_written() -> None:
    step = surgery.compile(program("bottleneck"), Model(), {"x": batch()["x"]})
    assert "F.gelu(" in step.source or "gelu(" in step.source
    base = 'F.linear(x, weights["first.weight"], weights["first.bias"])'
    assert step.source.count(base) == 1  # y is computed once, however often it is read


def test_bfloat16_runs_in_the_activations_dtype() -> None:
    model = Model(torch.bfloat16)
    adapted = surgery.apply(program("bottleneck"), model)
    x = torch.randn(8, 5, dtype=torch.bfloat16)
    assert adapted(x).dtype is torch.bfloat16
    first = adapted.get_submodule("first")
    assert first.get_parameter("D").dtype is torch.float32
    t = {name: parameter.detach().double() for name, parameter in first.named_parameters()}
    exact = nn.Linear(5, 7, dtype=torch.float64)
    exact.load_state_dict({name: t[name] for name in ("weight", "bias")})
    expected = reference("bottleneck", x.double(), exact, t)
    difference = (first(x).double() - expected).detach()
    assert float(difference.norm()) <= 0.02 * float(expected.detach().norm())


def test_strategies_other_than_branch_are_refused() -> None:
    text = f"{METHODS}\nadapt first {{ with shift()  strategy = fold }}"
    with pytest.raises(surgery.SurgError, match="fold"):
        surgery.plan(surgery.parse(text), Model())


def test_dropout_in_an_output_is_live_in_training_alone() -> None:
    methods = "method drop() { D = train normal(0.5)[out, out]\n output = y + dropout(y @ D, 0.5) }"
    text = f"{methods}\nadapt first {{ with drop() }}\nstep {{ loss = mse  batch = 3 }}"
    model = Model()
    step = surgery.compile(surgery.parse(text), model, {"x": batch()["x"]})
    x = batch()["x"]
    assert torch.equal(step.forward(x=x), step.forward(x=x))
    torch.testing.assert_close(step.merge()(x), step.forward(x=x))
    adapted = surgery.apply(surgery.parse(text.split("step")[0]), model)
    adapted.train()
    assert not torch.equal(adapted(x), adapted(x))
