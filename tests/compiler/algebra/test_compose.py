"""Composition of methods: names, terms, facts and mistakes; its values against the parts' own formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.compiler import p1_parse
from surgery.compiler.algebra.compose import Composed
from surgery.compiler.algebra.instance import instance
from surgery.compiler.printer import show
from surgery.compiler.program import Rule
from surgery.compiler.span import Source

METHODS = """
method first(rank: int = 2, share: real = 0) {
    A = train normal(1.0)[rank, in];  B = train normal(1.0)[out, rank]
    delta = B @ A
    input = dropout(x, share)
}
method scaled() {
    s = train normal(1.0)[in];  M = train normal(1.0)[out, in]
    delta = M
    input = x * s
}
method square() {
    requires in == out
    v = train normal(1.0)[in]
    delta = diag(v)
}
method moving(rank: int = 2, ratio: real = 2.0) {
    A = train normal(1.0)[rank, in];  B = train normal(1.0)[out, rank]
    delta = B @ A
    after step { W += ratio * (delta - prev(delta)) }
}
method shrinking() {
    g = train ones[out];  h = state zeros[out]
    delta = diag(g) @ W
    after step { g = 0.9 * g;  h = g }
}
"""


def rule(text: str) -> Rule:
    (found,) = surgery.parse(f"{METHODS}\nadapt layer {{ with {text} }}\nstep {{ batch = 2  loss = mse }}").rules
    return found


def code_of(text: str) -> str:
    with pytest.raises(surgery.SurgError) as caught:
        rule(text)
    (found,) = caught.value.diagnostics
    return found.code


class Model(nn.Module):
    def __init__(self, inputs: int = 5, outputs: int = 5) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


def compiled(text: str, model: nn.Module) -> surgery.TrainingStep:
    program = surgery.parse(f"{METHODS}\nadapt layer {{ with {text} }}\n"
                            "step { optimizer = sgd(lr = 0.1)  batch = 4  loss = mse  compile = off }")  # fmt: skip
    return surgery.compile(program, model, {"x": torch.randn(4, 5, dtype=torch.float64)})


def test_names_arguments_and_text() -> None:
    found = rule("mask(W) * first(rank = 1) + first() - 0.5 * scaled()").method
    assert isinstance(found, Composed)
    assert [part.name for part in found.parts] == ["first", "first_2", "scaled"]
    text = "mask(W) * first(rank = 1, share = 0) + first(rank = 2, share = 0) - 0.5 * scaled()"
    assert found.name == text
    (item,) = p1_parse.run(Source("<text>", f"adapt layer {{ with {text} }}")).items
    assert show(item) == f"adapt layer {{ with {text} }}"


def test_builders_join_methods() -> None:
    method = surgery.method
    joined = surgery.call("mask", "W") * method("lora", rank=2) + 2 * method("lora") - method("lora_fa")
    program = surgery.Program(surgery.adapt("layer", joined))
    assert "with mask(W) * lora(rank = 2) + 2 * lora() - lora_fa()" in str(program)
    with pytest.raises(TypeError):
        _ = method("lora") + "lora"


def test_the_plan_builds_the_formula_again() -> None:
    model = Model()
    plan = surgery.plan(surgery.parse(f"{METHODS}\nadapt layer {{ with first(rank = 1) + scaled() }}"), model)
    (site,) = plan.sites
    assert [tensor.key for tensor in site.tensors] == [
        "layer.first.A", "layer.first.B", "layer.scaled.s", "layer.scaled.M"
    ]  # fmt: skip
    assert site.method == "first(rank = 1, share = 0) + scaled()" and site.trainable == 10 + 5 + 25
    formula = instance(type(plan).model_validate_json(plan.model_dump_json()), site.formula)
    assert [term.reads_plain_x for term in formula.terms] == [True, False]
    assert site.facts.merges and not site.facts.exports_as_lora


def test_terms_with_one_input_are_one() -> None:
    plan = surgery.plan(surgery.parse(f"{METHODS}\nadapt layer {{ with first() + first(rank = 1) }}"), Model())
    formula = instance(plan, plan.sites[0].formula)
    assert len(formula.terms) == 1 and plan.sites[0].facts.exports_as_lora and plan.sites[0].facts.rank_bound == 3


VALUES = {
    "mask(W) * first() + scaled()": lambda t, W, x: (
        x @ ((W != 0) * (t["first.B"] @ t["first.A"])).T + (x * t["scaled.s"]) @ t["scaled.M"].T
    ),
    "first() @ square() - 2 * scaled()": lambda t, W, x: (
        x @ (t["first.B"] @ t["first.A"] @ torch.diag(t["square.v"])).T - 2 * (x * t["scaled.s"]) @ t["scaled.M"].T
    ),
    "-(first(share = 0.5) + scaled()) / 4 + 0.5 * W": lambda t, W, x: (
        -(x @ (t["first.B"] @ t["first.A"]).T + (x * t["scaled.s"]) @ t["scaled.M"].T) / 4 + 0.5 * x @ W.T
    ),
    "first() * first(rank = 3)": lambda t, W, x: (
        x @ ((t["first.B"] @ t["first.A"]) * (t["first_2.B"] @ t["first_2.A"])).T
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_values_gradients_and_merging(text: str) -> None:
    model = Model()
    with torch.no_grad():
        model.layer.weight[0, :2] = 0  # what the mask leaves out
    step = compiled(text, model)
    tensors = {
        name: tensor.detach().clone().requires_grad_() for name, tensor in step.parameters_by_site["layer"].items()
    }
    x, target = (torch.randn(4, 5, dtype=torch.float64) for _ in range(2))
    W, b = model.layer.weight.detach(), model.layer.bias.detach()

    def reference() -> torch.Tensor:
        return torch.tanh(x @ W.T + b + VALUES[text](tensors, W, x))

    torch.testing.assert_close(step.forward(x=x), reference().detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(step.merge()(x), step.forward(x=x), rtol=1e-11, atol=1e-11)
    if "0.5)" in text:
        return  # dropout is live in the step itself
    torch.autograd.backward((reference() - target).square().mean())
    step({"x": x, "labels": target})
    for name, tensor in step.parameters_by_site["layer"].items():
        grad = tensors[name].grad
        assert grad is not None
        torch.testing.assert_close(tensor.detach(), tensors[name].detach() - 0.1 * grad, rtol=1e-9, atol=1e-11)


def test_dropout_acts_on_its_own_term() -> None:
    model = Model()
    step = compiled("first(share = 0.5) + scaled()", model)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.manual_seed(0)
    found = step._namespace["forward"](step.weights, x, training=True)[0]
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    t, W = step.parameters_by_site["layer"], model.layer.weight
    change = dropped @ (t["first.B"] @ t["first.A"]).T + (x * t["scaled.s"]) @ t["scaled.M"].T
    torch.testing.assert_close(found, torch.tanh(x @ W.T + model.layer.bias + change))


def test_events_belong_to_their_part() -> None:
    model = Model()
    step = compiled("moving() + 0.5 * shrinking()", model)
    before = {name: tensor.detach().clone() for name, tensor in step.parameters_by_site["layer"].items()}
    W = step.weights["layer.weight"].detach().clone()
    x, target = (torch.randn(4, 5, dtype=torch.float64) for _ in range(2))
    leaves = {name: value.clone().requires_grad_(name != "shrinking.h") for name, value in before.items()}
    change = leaves["moving.B"] @ leaves["moving.A"] + 0.5 * torch.diag(leaves["shrinking.g"]) @ W
    loss = (torch.tanh(x @ (W + change).T + model.layer.bias.detach()) - target).square().mean()
    torch.autograd.backward(loss)
    step({"x": x, "labels": target})
    after = step.parameters_by_site["layer"]
    moved = after["moving.B"] @ after["moving.A"] - before["moving.B"] @ before["moving.A"]
    torch.testing.assert_close(step.weights["layer.weight"], (W + 2 * moved).detach())
    grad = leaves["shrinking.g"].grad
    assert grad is not None
    torch.testing.assert_close(after["shrinking.g"].detach(), 0.9 * (before["shrinking.g"] - 0.1 * grad))
    torch.testing.assert_close(after["shrinking.h"], after["shrinking.g"].detach())


@pytest.mark.parametrize("text", ["moving() + first(share = 0.0)", "first() + moving(ratio = 0.5)"])
def test_a_composed_sum_telescopes(text: str) -> None:
    steps = []
    for update in ("literal", "telescope"):
        torch.manual_seed(1)
        model = Model()
        program = surgery.parse(f"{METHODS}\nadapt layer {{ with {text}  update = {update} }}\n"
                                "step { optimizer = sgd(lr = 0.1)  batch = 4  loss = mse  compile = off }")  # fmt: skip
        steps.append(surgery.compile(program, model, {"x": torch.randn(4, 5, dtype=torch.float64)}))
    for _ in range(4):
        batch = {name: torch.randn(4, 5, dtype=torch.float64) for name in ("x", "labels")}
        losses = [step(batch).loss for step in steps]
        torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*(step.effective_weight("layer") for step in steps), rtol=1e-9, atol=1e-11)


def test_what_reads_w_does_not_telescope() -> None:
    text = f"{METHODS}\nadapt layer {{ with mask(W) * first() + moving()  update = telescope }}"
    with pytest.raises(surgery.SurgError, match="delta reads W"):
        surgery.plan(surgery.parse(text), Model())


def test_requirements_of_the_parts_hold() -> None:
    text = f"{METHODS}\nadapt layer {{ with first() + square() }}"
    assert surgery.plan(surgery.parse(text), Model()).totals.sites == 1
    with pytest.raises(surgery.SurgError):
        surgery.plan(surgery.parse(text), Model(5, 6))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("dora() + lora()", "SURG035"),
        ("hadamard() + lora()", "SURG035"),
        ("2 * moving()", "SURG035"),
        ("mask(W) * (first() + moving())", "SURG035"),
        ("first() - moving()", "SURG035"),
        ("first(share = 0.1) * first(share = 0.2)", "SURG035"),
        ("first() * scaled()", "SURG035"),
        ("lorra() + first()", "SURG002"),
        ("first(rnk = 2) + first()", "SURG002"),
        ("first(rank = 0) + first()", "SURG026"),
        ("2 * W", "SURG004"),
        ("first() @ first()", "SURG005"),
        ("first()[0, :] + first(share = 0.5)", "SURG005"),
        ("first() + later", "SURG002"),
    ],
)
def test_mistakes(text: str, code: str) -> None:
    assert code_of(text) == code


def test_module_scope_nests_the_tensors() -> None:
    model = Model()
    adapted = surgery.apply(
        surgery.parse(f"{METHODS}\nadapt layer {{ with mask(W) * first() + first(rank = 1) }}"), model
    )
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names == ["layer.first.A", "layer.first.B", "layer.first_2.A", "layer.first_2.B"]
    x = torch.randn(2, 5, dtype=torch.float64)
    t = dict(adapted.get_submodule("layer").named_parameters())
    W = t["weight"] + (t["weight"] != 0) * (t["first.B"] @ t["first.A"]) + t["first_2.B"] @ t["first_2.A"]
    torch.testing.assert_close(adapted(x), torch.tanh(nn.functional.linear(x, W, t["bias"])))
    twin = Model()
    surgery.apply(surgery.parse(f"{METHODS}\nadapt layer {{ with mask(W) * first() + first(rank = 1) }}"), twin)
    twin.load_state_dict(adapted.state_dict())
    assert torch.equal(twin(x), adapted(x))


@pytest.mark.parametrize("text", ["0 * first()", "first() + 0 * square()", "sign(first())", "mask(first()) * square()"])
def test_a_part_that_no_gradient_reaches_is_refused(text: str) -> None:
    assert code_of(text) == "SURG004"


def test_methods_that_correct_the_weight_are_the_identity_together() -> None:
    start = torch.randn(4, 5, dtype=torch.float64)
    for text in ("pissa(2) + olora(2)", "pissa(2) + pissa(2)", "olora(2) + square() + pissa(2)"):
        model = Model()
        step = compiled(text, model)
        (site,) = step.plan.sites
        assert site.facts.identity_at_start == ("square" not in text)
        same = torch.allclose(step.forward(x=start), model(start), rtol=1e-12, atol=1e-12)
        assert same == site.facts.identity_at_start
