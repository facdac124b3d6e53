"""Scores against scikit-learn and SciPy, and an evaluation against the model's own loss, row by row."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.runtime.data import Examples
from surgery.runtime.evaluate import evaluate
from surgery.runtime.scores import of_classes, of_numbers

pytestmark = pytest.mark.usefixtures("captured_once")

CLASSES = 5
PAIRS = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=40)
NUMBERS = st.lists(
    st.tuples(st.sampled_from([-2.0, 0.0, 0.5, 3.0, 1e3]), st.floats(-1e3, 1e3, width=32)), min_size=2, max_size=40
)


@given(PAIRS)
def test_scores_of_classes_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    guesses, labels = (list(side) for side in zip(*pairs, strict=True))
    found = of_classes(torch.tensor(guesses), torch.tensor(labels), CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one class alone
        expected = {
            "accuracy": metrics.accuracy_score(labels, guesses),
            "f1": metrics.f1_score(labels, guesses, average="macro"),
            "matthews": metrics.matthews_corrcoef(labels, guesses),
        }
    assert found == pytest.approx(expected, abs=1e-12)


@given(NUMBERS)
def test_scores_of_numbers_are_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    one, other = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    found = of_numbers(one, other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant numbers
        expected = {"pearson": stats.pearsonr(one, other)[0], "spearman": stats.spearmanr(one, other)[0]}
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)


def encoder(labels: int) -> Any:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    config.num_labels = labels
    return BertForSequenceClassification(config).eval()


def decoder(vocabulary: int = 40) -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rows(labels: Any = None, count: int = 11) -> Examples:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    tokens = tuple(torch.randint(1, 40, (length,), generator=generator).tolist() for length in lengths)
    return Examples(tokens, labels, 0)


def compiled(model: nn.Module, task: str, batch: int) -> Any:
    """Trained for a step, so that the adapted model is not the model."""
    adapted, head = ("q_proj", "lm_head") if task == "causal_lm" else ("query", "classifier")
    text = f'model "given" {{ task = {task} }}\nadapt **.{adapted} {{ with lora(rank = 2) }}\ntrain {head}\n'
    step = surgery.compile(
        surgery.parse(text + f"step {{ optimizer = sgd(lr = 0.5)  batch = {batch}  steps = 3 }}"), model
    )
    found = rows(None if task == "causal_lm" else rows_of(task))
    step(found.batch(range(4)))
    return step


def rows_of(task: str) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(3)
    if "(labels = 1)" in task:
        return tuple(torch.randn(11, generator=generator).tolist())
    return tuple(torch.randint(3, (11,), generator=generator).tolist())


@pytest.mark.parametrize("batch", [4, 20])
def test_classes(batch: int) -> None:
    task = "sequence_classification(labels = 3)"
    step, data = compiled(encoder(3), task, batch), rows(rows_of("3"))
    found = evaluate(step, data)
    merged: Any = step.merge()
    with torch.no_grad():
        outputs = [merged(**data.batch([row])) for row in range(len(data))]
    guesses = [int(output.logits.argmax()) for output in outputs]
    expected = {
        "loss": sum(float(output.loss) for output in outputs) / len(data),
        "rows": 11.0,
        "accuracy": metrics.accuracy_score(data.labels, guesses),
        "f1": metrics.f1_score(data.labels, guesses, average="macro"),
        "matthews": metrics.matthews_corrcoef(data.labels, guesses),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_regression() -> None:
    task = "sequence_classification(labels = 1)"
    step, data = compiled(encoder(1), task, 4), rows(rows_of(task))
    found = evaluate(step, data)
    merged: Any = step.merge()
    with torch.no_grad():
        outputs = [merged(**data.batch([row])) for row in range(len(data))]
    guesses = [float(output.logits) for output in outputs]
    expected = {
        "loss": sum(float(output.loss) for output in outputs) / len(data),
        "rows": 11.0,
        "pearson": stats.pearsonr(guesses, data.labels)[0],
        "spearman": stats.spearmanr(guesses, data.labels)[0],
    }
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("vocabulary", [40, 8192])  # from 8192 on the loss makes logits in chunks
def test_a_causal_model_counts_tokens_not_batches(vocabulary: int) -> None:
    step, data = compiled(decoder(vocabulary), "causal_lm", 4), rows()
    assert ("head" in step._namespace) == (vocabulary == 8192)
    found = evaluate(step, data)
    merged: Any = step.merge()
    with torch.no_grad():
        losses = [
            (float(merged(input_ids=ids, labels=ids).loss), ids.shape[1] - 1)
            for ids in (torch.tensor([tokens]) for tokens in data.tokens)
        ]
    loss = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert found == pytest.approx({"loss": loss, "rows": 11.0, "perplexity": math.exp(loss)}, rel=1e-5)


def test_nothing_is_read_before_the_last_batch() -> None:
    """Stands for the device: a tensor that says when the host asks for its numbers."""
    said: list[str] = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.cpu, Tensor.tolist):
                said.append("read")
            return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    step, data = compiled(encoder(3), "sequence_classification(labels = 3)", 4), rows(rows_of("3"))
    run = step.evaluate

    def watched(batch: dict[str, Tensor]) -> Any:
        found = run(batch)
        said.append("batch")
        return type(found)(*(value.as_subclass(Watched) for value in vars(found).values()))

    step.evaluate = watched
    evaluate(step, data)
    assert said[:3] == ["batch"] * 3 and set(said[3:]) == {"read"}
