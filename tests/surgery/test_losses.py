"""Each task's loss is what the transformers model itself returns for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.runtime.losses import BINARY, CROSS_ENTROPY, MSE, NEXT_TOKEN, OUTPUT, Loss, choose, decoder_inputs


def mean(loss: Loss | None, output: Tensor, labels: Tensor) -> Tensor:
    assert loss is not None
    total, count = loss(output, labels)
    assert total.dim() == count.dim() == 0 and not count.is_floating_point()
    return total / count


def test_every_tasks_loss_is_the_models(architecture: Any) -> None:
    model, inputs, labels = architecture.model(), architecture.inputs(), architecture.labels()
    if labels.dim() == 2:
        labels[0, -3:] = labels[2, 0] = -100
    output = model(**inputs, labels=labels)
    loss = choose("auto", architecture.task, 3)
    torch.testing.assert_close(mean(loss, output.logits, labels), output.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "problem", "values"),
    [
        (1, None, torch.tensor([0.5, -1.0, 2.0, 0.0])),
        (1, None, torch.tensor([[0.5], [-1.0], [2.0], [0.0]])),
        (3, "multi_label_classification", torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])),
        (3, "regression", torch.randn(4, 3)),
        (3, "single_label_classification", torch.tensor([0, 2, 1, 1])),
    ],
)
def test_problem_types(architectures: Any, labels: int, problem: str | None, values: Tensor) -> None:
    model = architectures["bert"].model(num_labels=labels, problem_type=problem)
    output = model(**architectures["bert"].inputs(), labels=values)
    loss = choose("auto", "sequence_classification", labels, problem)
    torch.testing.assert_close(mean(loss, output.logits, values), output.loss)


def test_token_classification() -> None:
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16)  # fmt: skip
    config.num_labels = 4
    model = BertForTokenClassification(config).eval()
    labels = torch.randint(0, 4, (2, 6))
    labels[1, 4:] = -100
    output = model(torch.randint(0, 50, (2, 6)), labels=labels)
    torch.testing.assert_close(mean(choose("auto", "token_classification", 4), output.logits, labels), output.loss)


def test_the_decoder_reads_its_labels_one_place_later(architectures: Any) -> None:
    model = architectures["t5"].model()
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100]])
    inputs = architectures["t5"].inputs(2, 9)
    del inputs["decoder_input_ids"]
    shifted = decoder_inputs(labels, model.config.decoder_start_token_id, model.config.pad_token_id)
    assert shifted.tolist() == [[0, 5, 6, 7], [0, 8, 1, 0]]
    expected = model(**inputs, labels=labels)
    logits = model(**inputs, decoder_input_ids=shifted).logits
    torch.testing.assert_close(mean(choose("auto", "seq2seq_lm"), logits, labels), expected.loss)


def test_sums_over_parts_are_the_sum_of_the_whole() -> None:
    logits, labels = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
    labels[0, 2:] = -100
    for loss in (NEXT_TOKEN, CROSS_ENTROPY):
        whole = loss(logits, labels)
        parts = [loss(logits[rows], labels[rows]) for rows in (slice(0, 1), slice(1, 4))]
        torch.testing.assert_close(sum(total for total, _ in parts), whole[0])
        assert sum(int(count) for _, count in parts) == whole[1]
    single = torch.randn(())
    assert torch.equal(mean(OUTPUT, single, labels), single)


@pytest.mark.parametrize("loss", [NEXT_TOKEN, CROSS_ENTROPY, MSE, BINARY, OUTPUT], ids=lambda loss: loss.name)
def test_dtypes_and_source(loss: Loss) -> None:
    """Low precision is summed in float32, float64 stays; the source runs with torch alone."""
    shape = {"next_token": (2, 5, 3), "output": ()}.get(loss.name, (2, 3))
    whole = torch.ones(2, 5, dtype=torch.int64) if loss.name == "next_token" else torch.ones(2, dtype=torch.int64)
    labels = whole if loss.name in ("next_token", "cross_entropy", "output") else torch.ones(2, 3)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        if loss.name != "output":
            assert loss.total(torch.randn(shape, dtype=dtype), labels).dtype == expected
    names: dict[str, Any] = {"torch": torch}
    exec(loss.source, names)
    output = torch.randn(shape)
    assert torch.equal(names[loss.total.__name__](output, labels), loss.total(output, labels))
    assert torch.equal(names[loss.count.__name__](labels), loss.count(labels))


def test_which_loss() -> None:
    assert choose("mse", "causal_lm") is MSE and choose("auto", "masked_lm") is CROSS_ENTROPY
    assert choose("auto", "image_classification", 5) is CROSS_ENTROPY
    assert choose("auto", None) is None and choose("auto", "feature_extraction") is None
