"""`previous(e, k)` against plain torch in float64: values, gradients, merging, runs, and the text of the step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import surgery

pytestmark = pytest.mark.usefixtures("captured_once")

METHODS = """
method block(rank: int = 2, shortcuts: int = 1) {
    A = train normal(0.5)[rank, in];  B = train normal(0.5)[out, rank]
    delta = B @ A + sum(previous(B @ A, k) for k in 1..shortcuts)
}
method inputs(rank: int = 2) {
    A = train normal(0.5)[rank, in];  B = train normal(0.5)[out, rank]
    delta = B @ A
    input = x + previous(x)
}
method middle(rank: int = 2, shortcuts: int = 1) {
    A = train normal(0.5)[rank, in];  B = train normal(0.5)[out, rank]
    output = y + (x @ A.T + sum(previous(x @ A.T, k) for k in 1..shortcuts)) @ B.T
}
method weights() {
    A = train normal(0.5)[out, in]
    delta = A * previous(W) + previous(mask(W))
}
method alone() {
    A = train normal(0.5)[out, in]
    delta = A
    input = previous(x, 2)
}
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + torch.tanh(self.down(torch.tanh(self.up(x))))
        return found


class Model(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(layers)]).double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def change(call: str, index: int, t: list[dict[str, Tensor]], xs: list[Tensor], model: Model, kind: str) -> Tensor:
    """What a site adds to its base output; `xs` are the inputs of the sites up to its own."""
    own, x, shortcuts = t[index], xs[index], int((re.findall(r"shortcuts = (\d)", call) or "1")[0])
    before = range(max(0, index - shortcuts), index)
    if call.startswith("block"):
        return x @ sum((t[k]["B"] @ t[k]["A"] for k in before), own["B"] @ own["A"]).T
    if call.startswith("inputs"):
        return (x + xs[index - 1] if index else x) @ (own["B"] @ own["A"]).T
    if call.startswith("middle"):
        return sum((xs[k] @ t[k]["A"].T for k in before), x @ own["A"].T) @ own["B"].T
    if call.startswith("weights"):
        W = getattr(model.blocks[index - 1], kind).weight.detach()
        return x @ (own["A"] * W + (W != 0)).T if index else torch.zeros(())
    return xs[index - 2] @ own["A"].T if index > 1 else torch.zeros(())


def reference(call: str, model: Model, tensors: dict[str, list[dict[str, Tensor]]], x: Tensor) -> Tensor:
    seen: dict[str, list[Tensor]] = {"up": [], "down": []}

    def site(block: nn.Module, index: int, kind: str, rows: Tensor) -> Tensor:
        layer = getattr(block, kind)
        y = F.linear(rows, layer.weight, layer.bias)
        seen[kind].append(rows)
        return y + change(call, index, tensors[kind], seen[kind], model, kind) if kind in tensors else y

    for index, block in enumerate(model.blocks):
        x = x + torch.tanh(site(block, index, "down", torch.tanh(site(block, index, "up", x))))
    return x


def compiled(call: str, kinds: str, model: Model, extra: str = "") -> Any:
    text = f"{METHODS}\nadapt blocks.*.{{{kinds}}} {{ with {call} {extra} }}\n"
    text += "step { optimizer = sgd(lr = 0.1)  batch = 3  loss = mse  compile = off }"
    return surgery.compile(surgery.parse(text), model, {"x": torch.randn(3, 5, dtype=torch.float64)})


def leaves(step: Any, kinds: str) -> dict[str, list[dict[str, Tensor]]]:
    return {
        kind: [
            {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
            for path, tensors in step.parameters_by_site.items()
            if path.endswith(kind)
        ]
        for kind in kinds.split(",")
    }


CALLS = ("block()", "block(shortcuts = 2)", "inputs()", "middle(shortcuts = 2)", "weights()", "alone()")


@pytest.mark.parametrize("kinds", ["up", "up,down"])
@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients(call: str, kinds: str) -> None:
    model = Model()
    step = compiled(call, kinds, model)
    t = leaves(step, kinds)
    x, target = (torch.randn(3, 5, dtype=torch.float64) for _ in range(2))
    expected = reference(call, model, t, x)
    torch.testing.assert_close(step.forward(x=x), expected.detach(), rtol=1e-11, atol=1e-12)
    torch.autograd.backward((expected - target).square().mean())
    step({"x": x, "labels": target})
    for kind, sites in t.items():
        for index, tensors in enumerate(sites):
            for name, leaf in tensors.items():
                moved = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                found = step.parameters_by_site[f"blocks.{index}.{kind}"][name].detach()
                torch.testing.assert_close(found, leaf.detach() - 0.1 * moved, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("strategy", ["branch", "fold", "recompute"])
@pytest.mark.parametrize("call", ["block(shortcuts = 3)", "weights()"])
def test_tensors_alone_merge_in_every_strategy(call: str, strategy: str) -> None:
    model = Model()
    step = compiled(call, "up", model, f"strategy = {strategy}")
    x = torch.randn(3, 5, dtype=torch.float64)
    assert all(site.facts.merges for site in step.plan.sites)
    torch.testing.assert_close(step.merge()(x), step.forward(x=x), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(step.forward(x=x), reference(call, model, leaves(step, "up"), x).detach())


@pytest.mark.parametrize("call", ["inputs()", "middle()", "alone()"])
def test_inputs_do_not_merge(call: str) -> None:
    step = compiled(call, "up", Model())
    facts = [site.facts for site in step.plan.sites]
    assert facts[0].merges and not facts[-1].merges
    assert facts[-1].merge_reason == "it reads the input of an earlier block"
    with pytest.raises(surgery.SurgError, match="it reads the input of an earlier block") as caught:
        step.merge()
    assert {found.code for found in caught.value.diagnostics} == {"SURG055"}


def test_what_is_read_is_counted_once() -> None:
    plan = compiled("block(shortcuts = 2)", "up", Model()).plan
    assert plan.totals.trainable == 4 * 2 * (5 + 7)
    assert [len(site.tensors) for site in plan.sites] == [2] * 4
    assert plan.sites[0].earlier == {}
    assert plan.sites[3].earlier == {
        "B_earlier_1": "blocks.2.up.B", "A_earlier_1": "blocks.2.up.A",
        "B_earlier_2": "blocks.1.up.B", "A_earlier_2": "blocks.1.up.A",
    }  # fmt: skip
    assert len(plan.formulas) == 3  # the first block, the second, and all others


def test_blocks_in_between_that_are_not_adapted() -> None:
    """`previous` counts blocks, not sites: two blocks back there is one, one block back there is none."""
    text = f"{METHODS}\nadapt blocks.{{0,2}}.up {{ with block(shortcuts = 2) }}"
    plan = surgery.plan(surgery.parse(text), Model())
    assert plan.sites[1].earlier == {"B_earlier_2": "blocks.0.up.B", "A_earlier_2": "blocks.0.up.A"}


@pytest.mark.parametrize("call", ["block(shortcuts = 2)", "middle()"])
def test_a_run_is_saved_and_loaded(call: str, tmp_path: Path) -> None:
    model = Model()
    step = compiled(call, "up", model)
    batch = {name: torch.randn(3, 5, dtype=torch.float64) for name in ("x", "labels")}
    step(batch)
    step.save(tmp_path / "run")
    loaded = surgery.load(tmp_path / "run", model=model, example_inputs={"x": batch["x"]})
    assert torch.equal(loaded.forward(x=batch["x"]), step.forward(x=batch["x"]))
    assert float(loaded(batch).loss) == float(step(batch).loss)


def test_an_event_reads_earlier_tensors() -> None:
    text = """
    method moving() {
        A = train normal(0.5)[out, in]
        delta = A + previous(A)
        after step { W += 0.5 * (delta - prev(delta)) }
    }
    adapt blocks.*.up { with moving() }
    step { optimizer = sgd(lr = 0.1)  batch = 3  loss = mse  compile = off }
    """
    model = Model(3)
    step = surgery.compile(surgery.parse(text), model, {"x": torch.randn(3, 5, dtype=torch.float64)})
    tensors = [step.parameters_by_site[f"blocks.{index}.up"]["A"] for index in range(3)]
    before = [tensor.detach().clone() for tensor in tensors]
    step({name: torch.randn(3, 5, dtype=torch.float64) for name in ("x", "labels")})
    moved = [tensor.detach() - start for tensor, start in zip(tensors, before, strict=True)]
    for index, block in enumerate(model.blocks):
        expected = block.up.weight + 0.5 * (moved[index] + (moved[index - 1] if index else 0))  # type: ignore[union-attr,operator]
        torch.testing.assert_close(step.weights[f"blocks.{index}.up.weight"].detach(), expected.detach())
    with pytest.raises(surgery.SurgError, match="another block"):
        surgery.plan(surgery.parse(text.replace("moving() }", "moving()  update = telescope }")), model)


def llama(layers: int) -> nn.Module:
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
                "vocab_size": 64, "num_hidden_layers": layers}  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings))
    return model


@pytest.mark.parametrize(
    "call", ["reslora(rank = 2, shortcuts = 2)", "reslora_input(rank = 2)", "reslora_middle(rank = 2, shortcuts = 2)"]
)
def test_a_function_per_block_however_many_there_are(call: str) -> None:
    lengths = set()
    for layers in (5, 9):
        text = f"adapt model.layers.*.{{self_attn,mlp}}.*_proj {{ with {call} }}\nstep {{ batch = 2  steps = 3 }}"
        source = surgery.compile(surgery.parse(text), llama(layers)).source
        functions = re.findall(r"^def llama_decoder_layer\w*\(", source, re.MULTILINE)
        assert len(functions) == (2 if "input" in call else 3)
        forward = source[source.index("# --- Forward") : source.index("COMPILED")]
        lengths.add(len(forward.splitlines()))
    assert len(lengths) == 1


def test_what_previous_does_not_take() -> None:
    bodies = {
        "A = train zeros[out, in];  delta = previous(previous(A))": "SURG008",
        "output = y + previous(y)": "SURG008",
        "A = train zeros[layers, in];  B = train zeros[out];  delta = B[:, None] * previous(A[layer, :])": "SURG008",
        "A = train zeros[out, in];  delta = previous(A, 0)": "SURG004",
        "A = train zeros[out, in];  delta = previous(A, 1, 2)": "SURG004",
        "A = train previous(W)[out, in];  delta = A": "SURG002",
        "A_earlier_1 = train zeros[out, in];  delta = A_earlier_1": "SURG003",
    }
    for body, code in bodies.items():
        with pytest.raises(surgery.SurgError) as caught:
            surgery.parse(f"method m() {{ {body} }}")
        assert caught.value.diagnostics[0].code == code, body


def test_unequal_shapes_and_module_scope() -> None:
    model = Model(2)
    model.blocks[1].up = nn.Linear(5, 9).double()
    model.blocks[1].down = nn.Linear(9, 5, bias=False).double()
    text = f"{METHODS}\nadapt blocks.*.up {{ with block() }}"
    with pytest.raises(surgery.SurgError, match=r"\[7, 5\], this site is \[9, 5\]") as caught:
        surgery.plan(surgery.parse(text), model)
    assert caught.value.diagnostics[0].code == "SURG005"
    with pytest.raises(surgery.SurgError) as refused:
        surgery.apply(surgery.parse(text), Model(2))
    assert refused.value.diagnostics[0].code == "SURG060"
    surgery.apply(surgery.parse(text), Model(1))  # nothing is read there


@pytest.mark.parametrize("method", ["block", "inputs", "middle"])
def test_a_run_that_reads_across_blocks_is_refused_in_place(method: str, tmp_path: Path) -> None:
    data = torch.randn(3, 5, dtype=torch.float64)
    text = f"{METHODS}\nadapt blocks.*.up {{ with {method}() }}\nstep {{ batch = 3  loss = mse }}"
    surgery.compile(surgery.parse(text), Model(2), {"x": data}).save(tmp_path / "run")
    with pytest.raises(surgery.SurgError) as refused:
        surgery.apply(tmp_path / "run", Model(2))
    assert refused.value.diagnostics[0].code == "SURG060"
