"""Packed rows: every document once, alone in its attention and in its labels, and refused where a model mixes them."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.runtime.calibrate import calibration_batches
from surgery.runtime.data import IGNORED, Data, Examples, Packed, Stream
from surgery.runtime.data.packing import pack
from surgery.runtime.train import train
from tests.models import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("captured_once")

VOCABULARY = 96
SPEC = """
model "unused" {{ task = causal_lm }}
adapt {where} {{ with lora(rank = 2, alpha = 16) }}
step {{ optimizer = sgd(lr = 0.5)  batch = {batch}  steps = 3 }}
data "unused.jsonl" {{ text = t  pack = {packed}  max_length = 24 }}
"""


def documents(*lengths: int, learned: bool = False, seed: int = 0) -> Examples:
    random = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, VOCABULARY, (length,), generator=random).tolist() for length in lengths]
    masks = [torch.rand(length, generator=random).lt(0.5).byte().tolist() for length in lengths]
    return Examples(tuple(array("i", row) for row in tokens), None, 0, tuple(map(bytes, masks)) if learned else None)


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64)  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def compiled(model: nn.Module, where: str = "**.{q,v}_proj", batch: str = "8", packed: str = "true") -> Any:
    step = surgery.compile(surgery.parse(SPEC.format(where=where, batch=batch, packed=packed)), model)
    for site in step.plan.sites:  # else the adapted model would be the model
        values = torch.randn(step.weights[f"{site.path}.B"].shape, generator=torch.Generator().manual_seed(1))
        step.weights[f"{site.path}.B"].data.copy_(values)
    return step


def positions(rows: Packed, row: int) -> list[tuple[int, int, int]]:
    """Document, begin and end of each part of a row."""
    found, start = [], 0
    for document in rows.rows[row]:
        found.append((document, start, start + rows.documents.length(document)))
        start = found[-1][2]
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=60))
def test_every_document_is_in_one_row_that_holds_it(lengths: list[int]) -> None:
    packed = pack(documents(*lengths), 24)
    assert sorted(number for row in packed.rows for number in row) == list(range(len(lengths)))
    sizes = [packed.length(row) for row in range(len(packed))]
    assert max(sizes) <= 24 and sizes == [sum(lengths[number] for number in row) for row in packed.rows]
    # Best fit leaves no two rows that could be one.
    smallest = sorted(sizes)[:2]
    assert len(sizes) == 1 or sum(smallest) > 24
    assert packed == pack(documents(*lengths), 24)


def test_rows_are_nearly_full() -> None:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 900, (3000,), generator=random).tolist()
    packed = pack(documents(*lengths), 2048)
    assert sum(lengths) / (2048 * len(packed)) > 0.995


def test_a_batch_starts_over_with_each_document() -> None:
    packed = Packed(documents(3, 2, 4), ((0, 1), (2,)))
    batch = packed.batch([1, 0])
    tokens = packed.documents.tokens
    assert batch["input_ids"].tolist() == [[*tokens[2], 0], [*tokens[0], *tokens[1]]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, *tokens[2][1:], no], [no, *tokens[0][1:], no, *tokens[1][1:]]]
    assert [packed.label_count(row) for row in (0, 1)] == [3, 3] == batch["labels"].ne(no).sum(1).flip(0).tolist()


def test_labels_of_a_packed_row_are_those_of_its_documents() -> None:
    packed = pack(documents(7, 9, 12, 5, 8, learned=True), 24)
    batch = packed.batch(range(len(packed)))
    for row in range(len(packed)):
        for document, start, end in positions(packed, row):
            alone = packed.documents.batch([document])["labels"][0]
            assert batch["labels"][row, start] == IGNORED
            assert torch.equal(batch["labels"][row, start + 1 : end], alone[1:])


def test_packed_batches_depend_on_the_step_alone_and_have_one_shape() -> None:
    packed = pack(documents(*(3 + number * 7 % 20 for number in range(40))), 24)
    stream, resumed = Stream(packed, 4, seed=5), Stream(packed, 4, seed=5)
    seen = [stream.batch(step) for step in range(2 * stream.batches_per_epoch)]
    assert {batch["input_ids"].shape[1] for batch in seen} == {packed.longest}
    step = stream.batches_per_epoch + 2
    assert all(torch.equal(resumed.batch(step)[name], seen[step][name]) for name in seen[step])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "qwen3_moe", "gpt2"])
def test_packed_logits_are_those_of_each_document_alone(name: str) -> None:
    if name == "llama":
        model, where = llama(), "**.{q,v}_proj"
    else:
        architecture = ARCHITECTURES[name]
        model, where = architecture.model(), architecture.adapt
    step = compiled(model, where)
    packed = pack(documents(5, 7, 3, 11, 4, 6, 9), 24)
    batch = packed.batch(range(len(packed)))
    together = step.forward(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    unlike = 0.0
    for row in range(len(packed)):
        for document, start, end in positions(packed, row):
            ids = torch.tensor([packed.documents.tokens[document]])
            alone = step.forward(input_ids=ids).logits[0]  # without positions a row is one document
            torch.testing.assert_close(together[row, start:end], alone, rtol=0, atol=1e-5)
            leaking = step.forward(input_ids=batch["input_ids"][row : row + 1]).logits[0, start:end]
            unlike = max(unlike, float((leaking - alone).abs().max()))
    assert unlike > 1e-2  # read as one document the same row says something else


def test_the_loss_and_its_gradients_are_those_of_the_documents() -> None:
    step = compiled(llama(torch.float64))
    rows = documents(5, 7, 3, 11, 4, 6, 9, learned=True)
    found = {}
    for name, batch in {"packed": pack(rows, 24).batch([0, 1]), "alone": rows.batch(range(7))}.items():
        ready = step._ready(batch, labels=True)
        step.optimizer.zero_grad()
        loss = step._namespace["gradients"](step.weights, ready)
        grads = {key: value.grad.clone() for key, value in step.weights.items() if value.grad is not None}
        found[name] = (loss, step.label_count(batch), grads)
    assert found["packed"][1] == found["alone"][1]
    torch.testing.assert_close(found["packed"][0], found["alone"][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found["packed"][2], found["alone"][2], rtol=1e-9, atol=1e-13)


def test_the_first_token_of_a_document_has_no_label() -> None:
    step = compiled(llama())
    batch = pack(documents(5, 7, 3), 24).batch([0])
    count = step.label_count(batch)
    everywhere = {**batch, "labels": batch["input_ids"].clone()}
    assert int(count) == 4 + 6 + 2 and torch.equal(step.label_count(everywhere), count)
    assert int(step.label_count({name: batch[name] for name in ("input_ids", "labels")})) == int(count)
    with pytest.raises(surgery.SurgError, match=r"SURG044.*`position_ids` has shape \[1, 3\]"):
        step({**batch, "position_ids": batch["position_ids"][:, :3]})


@pytest.mark.parametrize("packed", ["true", "false"])
def test_micro_batches_of_unequal_rows_change_nothing(packed: str) -> None:
    """The losses are normalised by all label tokens of the step, not by those of each micro-batch."""
    rows: Any = documents(*(2 + number * 5 % 17 for number in range(32)), learned=True)
    rows = pack(rows, 24) if packed == "true" else rows
    taken = {}
    for batch in ("8", "8  micro_batch = 2"):
        step = compiled(llama(torch.float64), batch=batch, packed=packed)
        stream = Stream(rows, 8, seed=0)
        losses = torch.stack([step(stream.batch(number)).loss for number in range(3)])
        taken[batch] = losses, {key: value.detach() for key, value in step.weights.items() if value.requires_grad}
    counts = [int(step.label_count({k: v[at : at + 2] for k, v in stream.batch(0).items()})) for at in (0, 2, 4, 6)]
    assert len(set(counts)) > 1  # else a mean of means would do
    whole, parts = taken.values()
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-13)


def test_a_model_that_mixes_documents_is_refused() -> None:
    opt = ARCHITECTURES["opt"]  # takes position_ids, and makes its mask without them
    with pytest.raises(surgery.SurgError, match=r"(?s)SURG031.*does not tell the documents of a packed row apart"):
        compiled(opt.model(dropout=0.0), opt.adapt)


def test_a_model_without_positions_is_refused_in_the_plan() -> None:
    bloom = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=32))
    text = SPEC.format(where="**.query_key_value", batch=8, packed="true")
    with pytest.raises(surgery.SurgError) as raised:
        surgery.plan(surgery.parse(text), bloom)
    (found,) = raised.value.diagnostics
    assert found.code == "SURG031" and found.span is not None and found.span.text == "pack = true"


def test_the_predicted_memory_is_of_packed_rows() -> None:
    program = surgery.parse(SPEC.format(where="**.{q,v}_proj", batch=8, packed="true"))
    memory = surgery.plan(program, llama(), memory=True).memory
    assert memory is not None and (memory.rows, memory.length) == (8, 24)


def test_calibration_takes_the_documents_of_packed_rows() -> None:
    """A start that reads gradients: the same from packed data as from its documents."""
    rows = documents(5, 7, 3, 11, 4, 6, 9)
    text = SPEC.format(where="**.{q,v}_proj", batch="8", packed="true").replace("lora(rank = 2, alpha = 16)", "mine()")
    method = "method mine() { A = train right_singular(grad(W), 2); B = train zeros[out, 2]; delta = B @ A }\n"
    program, model = surgery.parse(method + text), llama()
    batches = calibration_batches(surgery.plan(program, model), Data(train=pack(rows, 24), held_out=None))
    assert [batch["input_ids"].shape[0] for batch in batches] == [7] and "attention_mask" in batches[0]
    step = surgery.compile(program, model, calibration=batches)
    alone = surgery.compile(program, model, calibration=[rows.batch(range(7))])
    for site in step.plan.sites:
        torch.testing.assert_close(step.weights[f"{site.path}.A"], alone.weights[f"{site.path}.A"], rtol=0, atol=1e-4)


def test_a_packed_run_goes_on_inside_an_epoch_to_the_bit(tmp_path: Path) -> None:
    data = Data(train=pack(documents(*(3 + number * 7 % 20 for number in range(30))), 24), held_out=documents(5, 9))
    whole, parts = compiled(llama(), batch="4"), compiled(llama(), batch="4")
    whole.steps, parts.steps = 6, 2
    assert parts.steps < Stream(data.train, 4, 0).batches_per_epoch < whole.steps
    train(whole, data, None, progress=False)
    train(parts, data, tmp_path / "run", progress=False)
    resumed = compiled(llama(), batch="4")
    resumed.load_state_dict(parts.state_dict())
    resumed.steps = 6
    outcome = train(resumed, data, None, progress=False)
    assert outcome.evaluation["loss"] > 0 and outcome.evaluation["rows"] == 2
    for key, value in whole.state_dict()["weights"].items():
        assert torch.equal(value, resumed.weights[key])
