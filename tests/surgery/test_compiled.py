"""`compile = on`: a block is compiled once for the shapes that come first and once for all others, at any depth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import surgery

LLAMA = {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 40, "max_position_embeddings": 256, "pad_token_id": 0}  # fmt: skip
BERT = {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 4, "vocab_size": 40, "num_labels": 3,
        "max_position_embeddings": 256, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts the graphs that torch compiles, without graph breaks and without a C++ compiler."""
    counter = CompileCounterWithBackend("aot_eager")
    compile_function, changed = torch.compile, {"backend": counter, "fullgraph": True}
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_function(function, **options | changed))
    yield counter
    torch._dynamo.reset()


def causal(layers: int, compiled: str = "on", sites: str = "model.layers.*.{self_attn,mlp}.*_proj", **more: Any) -> Any:
    """A step of a small Llama in float64."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", num_hidden_layers=layers, **LLAMA)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    settings = "  ".join(f"{name} = {value}" for name, value in more.items())
    program = surgery.parse(f"""
        adapt {sites} {{ with lora(rank = 4, alpha = 8) }}
        step {{ optimizer = adamw(lr = 1e-2)  batch = 4  steps = 9  loss = causal_lm  compile = {compiled} {settings} }}
    """)
    return surgery.compile(program, model=model, example_inputs={"input_ids": tokens(2, 8)["input_ids"]})


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    """A batch of random tokens."""
    ids = torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(rows * length))
    return {"input_ids": ids, "labels": ids}


def test_varying_lengths_and_batches_take_two_compilations_and_evaluation_two_more(
    compiled: CompileCounterWithBackend,
) -> None:
    step = causal(3)
    counts = []
    for rows, length in [(4, 64), (4, 64), (4, 128), (4, 96), (4, 77), (3, 64), (2, 33), (4, 64)]:
        step(tokens(rows, length))
        counts.append(compiled.frame_count)
    assert counts == [1, 1, 2, 2, 2, 2, 2, 2]
    for rows, length in [(4, 64), (4, 64), (4, 96), (3, 77)]:
        step.evaluate_loss(tokens(rows, length))
        counts.append(compiled.frame_count)
    assert counts[8:] == [3, 3, 4, 4]
    step(tokens(3, 50))
    # To torch a size of one is a shape of its own: one compilation more, once.
    for rows, length in [(1, 64), (1, 50), (4, 64), (2, 70)]:
        step(tokens(rows, length))
    assert compiled.frame_count == 5


def test_the_number_of_compilations_does_not_depend_on_the_depth(compiled: CompileCounterWithBackend) -> None:
    step = causal(9)
    for length in (16, 24, 20):
        step(tokens(4, length))
    assert compiled.frame_count == 2


def test_a_smaller_last_micro_batch_is_among_the_two(compiled: CompileCounterWithBackend) -> None:
    step = causal(2, micro_batch=3)
    for rows in (8, 8, 5):
        step(tokens(rows, 16))
    assert compiled.frame_count == 2


@pytest.mark.parametrize("sites", ["model.layers.*.{self_attn,mlp}.*_proj", "model.layers.2.mlp.*_proj"])
def test_the_gradient_that_the_first_block_gets_for_its_compilation_changes_nothing(
    compiled: CompileCounterWithBackend, sites: str
) -> None:
    plain, other = (causal(3, way, sites) for way in ("off", "on"))
    for rows, length in [(4, 16), (4, 24), (3, 20)]:
        batch = tokens(rows, length)
        torch.testing.assert_close(other(batch).loss, plain(batch).loss)
    for name, tensor in plain.weights.items():
        torch.testing.assert_close(other.weights[name], tensor)


def test_blocks_below_all_that_is_trained_get_no_gradient(compiled: CompileCounterWithBackend) -> None:
    """A gradient to the first block would run the backward of every frozen one."""
    step = causal(4, sites="model.layers.3.mlp.*_proj")
    reached = []
    for name in step._namespace["COMPILED"]:
        run = step._namespace[name]

        def watched(w: Any, hidden: Tensor, *more: Any, run: Any = run) -> Any:
            result = run(w, hidden, *more)
            reached.append(result.requires_grad)
            return result

        step._namespace[name] = watched
    step(tokens(4, 16))
    assert reached == [False, False, False, True]


def test_an_encoder_with_a_mask_and_a_trained_head(compiled: CompileCounterWithBackend) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", num_hidden_layers=3, **BERT)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float64)
    losses = []
    for way in ("off", "on"):
        program = surgery.parse(f"""
            adapt bert.encoder.layer.*.attention.self.{{query,value}} {{ with lora(rank = 4, alpha = 8) }}
            train classifier
            step {{ optimizer = adamw(lr = 1e-2)  batch = 4  steps = 9  loss = cross_entropy  compile = {way} }}
        """)
        batches = [sentences(rows, length) for rows, length in [(4, 16), (4, 24), (3, 20), (4, 16)]]
        example = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
        step = surgery.compile(program, model=model, example_inputs=example)
        losses.append([float(step(batch).loss) for batch in batches])
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    assert compiled.frame_count == 2


def sentences(rows: int, length: int) -> dict[str, Tensor]:
    """A batch with padding, and a class per row."""
    generator = torch.Generator().manual_seed(rows * length)
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    ids = torch.randint(1, 40, (rows, length), generator=generator) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": torch.randint(0, 3, (rows,), generator=generator),
    }


def test_reduce_overhead_without_cuda_graphs_says_so_and_runs(compiled: CompileCounterWithBackend) -> None:
    with pytest.warns(UserWarning, match="SURG058.*no.* on the device `cpu`"):
        step = causal(2, "reduce_overhead")
    reference = causal(2, "off")
    assert float(step(tokens(4, 16)).loss) == pytest.approx(float(reference(tokens(4, 16)).loss), rel=1e-10)
    assert compiled.frame_count == 1


def test_blocks_that_run_again_are_compiled_as_often(compiled: CompileCounterWithBackend) -> None:
    plain, other = causal(3, "off"), causal(3, "on", recompute="blocks")
    for rows, length in [(4, 16), (4, 24), (3, 20), (4, 16)]:
        batch = tokens(rows, length)
        torch.testing.assert_close(other(batch).loss, plain(batch).loss)
    assert compiled.frame_count == 2
