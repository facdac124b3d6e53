"""A step with the loss in chunks is the step on whole logits: gradients, evaluation, logits on request, and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import surgery
from surgery.compiler.emit import loss as emitted
from surgery.compiler.emit.head import head_of
from surgery.compiler.graph import tensors
from surgery.runtime.step import TrainingStep

VOCABULARY = 97
ROWS = 5  # of a chunk


def compiled(
    architecture: Any, monkeypatch: pytest.MonkeyPatch, rules: str = "", step: str = "", chunks: bool = True,
    dtype: torch.dtype = torch.float64, **settings: Any,
) -> TrainingStep:  # fmt: skip
    """A step with chunks of a few rows, or on whole logits."""
    monkeypatch.setattr(emitted, "WIDE", VOCABULARY if chunks else VOCABULARY + 1)
    model = architecture.model(**settings).to(dtype)
    rules = rules or f"adapt {architecture.adapt} {{ with lora(rank = 2, alpha = 4) }}"
    text = f'model "given" {{ task = {architecture.task} }}\n{rules}\nstep {{ optimizer = adamw(lr = 1e-2)  {step} }}'
    made = surgery.compile(surgery.parse(text), model=model, example_inputs=architecture.inputs())
    assert ("def head(" in made.source) == ("chunked_loss(" in made.source) == chunks
    if chunks:
        made._namespace["CHUNK"] = ROWS
    for name, weight in made.weights.items():  # adapters that start at zero would hide a wrong gradient
        if weight.requires_grad:
            torch.manual_seed(sum(name.encode()))
            with torch.no_grad():
                weight.add_(0.1 * torch.randn_like(weight))
    return made


def batch(architecture: Any, rows: int = 4) -> dict[str, Tensor]:
    labels = architecture.labels(rows)
    labels[0, -3:] = labels[2, 0] = -100
    return {**architecture.inputs(rows), "labels": labels}


def gradients(step: TrainingStep, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss of a batch and the gradient of everything that is trained."""
    step.optimizer.zero_grad()
    torch.manual_seed(0)
    loss = step._namespace["gradients"](step.weights, batch)
    found = {name: weight.grad for name, weight in step.weights.items() if weight.grad is not None}
    return {"loss": loss, **found}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 1
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance, msg=f"{name} differs")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "opt", "roberta", "t5"])
def test_every_language_model(architectures: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    architecture = architectures[name]
    given = batch(architecture)
    ours = compiled(architecture, monkeypatch)
    theirs = compiled(architecture, monkeypatch, chunks=False)
    equal(gradients(ours, given), gradients(theirs, given), 1e-10)
    total, count = ours.evaluate_loss(given)
    expected, _ = theirs.evaluate_loss(given)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0.0)
    assert count == theirs.label_count(given)
    inputs = {name: value for name, value in given.items() if name != "labels"}
    torch.testing.assert_close(ours.forward(**inputs).logits, theirs.forward(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "rules",
    [
        "train lm_head",
        "adapt lm_head { with lora(rank = 2, alpha = 4) }",
        "adapt lm_head { with lora(rank = 2, alpha = 4) }\ntrain model.norm",
        "adapt lm_head { with dora(rank = 2, alpha = 4) }",
        "adapt lm_head { with bitfit() }",
        "train model.embed_tokens",
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_trained(architectures: Any, monkeypatch: pytest.MonkeyPatch, rules: str, tied: bool) -> None:
    architecture = architectures["llama"]
    given = batch(architecture)
    if tied and "adapt" in rules:
        rules = rules.replace("{ with", "{ tie  with" if "lora" in rules else "{ untie  with")
    ours = compiled(architecture, monkeypatch, rules, tie_word_embeddings=tied)
    theirs = compiled(architecture, monkeypatch, rules, chunks=False, tie_word_embeddings=tied)
    equal(gradients(ours, given), gradients(theirs, given), 1e-10)
    for seed in range(2):  # and as a whole step
        one, other = ours(batch(architecture, 5 + seed)), theirs(batch(architecture, 5 + seed))
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("step", "dtype", "tolerance"),
    [
        ("micro_batch = 2  batch = 4", torch.float64, 1e-10),
        ("recompute = blocks", torch.float64, 1e-10),
        ("precision = bfloat16", torch.float32, 3e-3),
    ],
)
def test_every_setting_of_a_step(
    architectures: Any, monkeypatch: pytest.MonkeyPatch, step: str, dtype: torch.dtype, tolerance: float
) -> None:
    architecture = architectures["gemma2"]
    given = batch(architecture)
    rules = "train lm_head" if dtype == torch.float32 else ""
    ours = compiled(architecture, monkeypatch, rules, step, dtype=dtype)
    theirs = compiled(architecture, monkeypatch, rules, step, chunks=False, dtype=dtype)
    equal(gradients(ours, given), gradients(theirs, given), tolerance)
    torch.testing.assert_close(ours.evaluate_loss(given)[0], theirs.evaluate_loss(given)[0], rtol=1e-4, atol=1e-4)


def test_dropout_of_the_head(architectures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is live in training and off in evaluation, as everywhere."""
    architecture = architectures["llama"]
    given = batch(architecture)
    rules = "adapt lm_head { with lora(rank = 2, alpha = 4, dropout = 0.5) }"
    ours = compiled(architecture, monkeypatch, rules)
    theirs = compiled(architecture, monkeypatch, rules, chunks=False)
    assert "training" in ours.source.partition("def head(")[2].splitlines()[0]
    torch.testing.assert_close(ours.evaluate_loss(given)[0], theirs.evaluate_loss(given)[0], rtol=1e-10, atol=0.0)
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        losses.append(float(ours._namespace["gradients"](ours.weights, given)))
    assert len(set(losses)) == 3


def test_compiled(architectures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that does more than a product is compiled: once for the first rows, once for all other numbers of them."""
    counter = CompileCounterWithBackend("aot_eager")
    compile_function, changed = torch.compile, {"backend": counter, "fullgraph": True}
    architecture = architectures["gemma2"]
    theirs = compiled(architecture, monkeypatch, chunks=False)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_function(function, **options | changed))
    ours = compiled(architecture, monkeypatch, step="compile = on")
    assert ours._namespace["COMPILED"][-1] == "head"
    counts = []
    for rows in (4, 4, 3, 5, 7):
        given = batch(architecture, rows)
        equal(gradients(ours, given), gradients(theirs, given), 1e-10)
        counts.append(counter.frame_count)
    # block and head for the first shapes, and a last chunk of one row; then both for all other numbers
    assert counts[0] == counts[1] <= 4 and counts[2:] == [counts[0] + 2] * 3
    torch._dynamo.reset()


class Widest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most rows that a tensor had whose last axis is the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,) and tensor.is_contiguous():
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return result


def test_whole_logits_never_exist(architectures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = architectures["llama"]
    given = batch(architecture)
    for chunks, expected in ((True, ROWS), (False, given["labels"].numel())):
        step = compiled(architecture, monkeypatch, chunks=chunks)
        with Widest() as widest:  # type: ignore[no-untyped-call]
            step(given)
            step.evaluate_loss(given)
        assert widest.rows == expected


class Recurring(nn.Module):
    """Logits that are no function of single rows: each adds up those before it, or meets a bias of its own place."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(4, 4), nn.Linear(4, 9), kind
        self.place = nn.Parameter(torch.randn(5, 9))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(x)))
        return {"sum": y.cumsum(1), "place": y + self.place, "softmax": y.softmax(1), "rows": y * 2}[self.kind]


@pytest.mark.parametrize(("kind", "found"), [("sum", False), ("place", False), ("softmax", False), ("rows", True)])
def test_only_what_is_made_row_by_row_is_a_head(kind: str, found: bool) -> None:
    from surgery.compiler import p5_capture

    graph = p5_capture.run(Recurring(kind), {"x": torch.randn(2, 5, 4)}, "token_classification")
    head = head_of(graph.module.graph, tensors(graph.module))
    assert (head is not None) == found
    if head is not None:
        assert head.vocabulary == 9 and head.pointwise and head.hidden.meta["val"].shape[-1] == 4
