"""Programs without text: they print as `.surg`, and are the programs that the text gives."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import surgery
from surgery.compiler import nodes

TEXT = """
model "org/name" { task = sequence_classification(labels = 3)  revision = "main" }
adapt ** : Linear where in >= 4 except head { with lora(rank = 2, alpha = 0.5)  expect 1  strategy = fold }
train head { lr = 5e-3 }
freeze head.bias
step { optimizer = sgd(lr = 1e-2, momentum = 0.9)  schedule = linear(warmup = 0.1)  batch = 4 }
data "rows.jsonl" { text = "{question}"  label = kind  max_length = 64 }
"""


def built() -> surgery.Program:
    return surgery.Program(
        surgery.model("org/name", task=surgery.call("sequence_classification", labels=3), revision="main"),
        surgery.adapt(
            "**", surgery.method("lora", rank=2, alpha=0.5), expect=1, classes=["Linear"], where="in >= 4",
            exclude=["head"], strategy="fold",
        ),
        [surgery.train("head", lr=5e-3), surgery.freeze("head.bias")],
        step=surgery.step(
            optimizer=surgery.call("sgd", lr=1e-2, momentum=0.9), schedule=surgery.call("linear", warmup=0.1), batch=4
        ),
        data=surgery.data("rows.jsonl", text="{question}", label="kind", max_length=64),
    )  # fmt: skip


class Model(nn.Module):
    """A block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"first": nn.Linear(4, 6)})
        self.head = nn.Linear(6, 3)


def test_a_built_program_is_the_one_of_the_text() -> None:
    program, written = built(), surgery.parse(TEXT)
    assert surgery.parse(str(program)).tree == program.tree
    places = {"place", "spec", "file"}
    for one, other in zip(program.rules, written.rules, strict=True):
        assert (one.method, one.arguments, one.expect, one.strategy) == (
            other.method, other.arguments, other.expect, other.strategy,
        )  # fmt: skip
    assert program.step == written.step
    assert program.model == written.model
    assert program.data is not None and written.data is not None
    assert program.data.model_dump(exclude=places) == written.data.model_dump(exclude=places)
    plans = [surgery.plan(one, Model()) for one in (program, written)]
    found = [[site.model_dump(exclude=places) for site in plan.sites] for plan in plans]
    assert found[0] == found[1] and len(found[0]) == 1
    assert [plan.totals for plan in plans][0] == plans[1].totals


def test_items_may_be_text_and_methods_of_its_own() -> None:
    own = "method mine() { B = train zeros[out, in]; delta = B }"
    program = surgery.Program(own, surgery.adapt("head", "mine"), rules=["adapt **.first { with lora(rank = 1) }"])
    assert [site.path for site in surgery.plan(program, Model()).sites] == ["head", "block.first"]


def test_what_is_wrong_is_said_at_the_printed_text() -> None:
    with pytest.raises(surgery.SurgError) as raised:
        surgery.Program(surgery.adapt("head", surgery.method("lroa", rank=2)))
    (found,) = raised.value.diagnostics
    assert found.code == "SURG002" and found.span is not None and found.span.text == "lroa(rank = 2)"


@pytest.mark.parametrize("item", [3, {"adapt": "head"}, object()])
def test_what_is_no_item_is_refused(item: object) -> None:
    with pytest.raises(TypeError, match="no item of a program"):
        surgery.Program(item)


def test_conversations_and_splits_are_built() -> None:
    def data(**settings: Any) -> Any:
        program = surgery.Program(surgery.adapt("**", "lora"), data=surgery.data("org/chats", **settings))
        assert surgery.parse(str(program)).tree == program.tree
        return program.data

    chat = data(messages="messages", template="llama-3", pack=True, split="train_sft", eval=nodes.Name("test_sft"))
    assert (chat.template, chat.pack, chat.split, chat.eval_split, chat.eval) == (
        "llama-3", True, "train_sft", "test_sft", None,
    )  # fmt: skip
    pair = data(prompt="Q: {question}", completion="{answer}", eval="valid.jsonl")
    assert (pair.prompt, pair.completion, pair.eval) == ("Q: {question}", "{answer}", "valid.jsonl")
