"""The predicted memory of a step is that of the step itself: the same count over a run with real tensors is equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import surgery
from surgery.compiler.algebra.cost import Kept
from surgery.compiler.memory import measured, of_plan, predicted, without_storage
from surgery.compiler.plan import MemoryPlan
from surgery.compiler.storages import Storages
from surgery.runtime.step import TrainingStep

LENGTH = 24
SUMMED = ("weights", "trained", "gradients", "optimizer", "kept", "outputs", "backward")


def compiled(architecture: Any, method: str = "lora(rank = 2)", step: str = "batch = 4", **model: Any) -> TrainingStep:
    text = architecture.spec(method, step)
    return surgery.compile(surgery.parse(text), model=architecture.model(**model))


def batch_of(architecture: Any) -> dict[str, Tensor]:
    return {**architecture.inputs(4, LENGTH), "labels": architecture.labels(4, LENGTH)}


def others(step: TrainingStep) -> list[Tensor]:
    own = {tensor.untyped_storage()._cdata for tensor in step.weights.values()}
    model = [*step.model.parameters(), *step.model.buffers()]
    return [tensor for tensor in model if tensor.untyped_storage()._cdata not in own]


@pytest.mark.parametrize(
    ("name", "method", "settings", "dropout"),
    [
        ("llama", "lora(rank = 2)", "", 0.0),
        ("llama", "lora(rank = 2)", "recompute = blocks", 0.0),
        ("llama", "lora(rank = 2)", "recompute = budget(0.5)  micro_batch = 3  clip = 1.0", 0.0),
        ("llama", "lora(rank = 2)", "recompute = blocks  precision = bfloat16", 0.0),
        ("llama", "delta_lora(rank = 2, start = 1)", "", 0.0),
        ("llama", "dora(rank = 2)", "", 0.0),
        ("llama", "lora(rank = 2)  strategy = recompute", "", 0.0),
        ("gpt2", "lora(rank = 2)", "recompute = blocks", 0.1),
        ("bert", "lora(rank = 2, dropout = 0.1)", "", 0.0),
        ("bert", "lora(rank = 2)", "recompute = blocks  precision = float16", 0.1),
        ("vit", "lora(rank = 2)", "", 0.0),
    ],
)
def test_it_is_what_a_real_run_takes(name: str, method: str, settings: str, dropout: float, architectures: Any) -> None:
    architecture = architectures[name]
    step = compiled(architecture, method, f"batch = 4  {settings}", dropout=dropout)
    found = predicted(step, LENGTH, "cpu")
    real = measured(step, step.weights, others(step), batch_of(architecture))
    assert found == real
    assert found.peak == sum(getattr(found, part) for part in SUMMED)
    assert found.kept == sum(found.blocks.values())


def test_a_whole_parameter_counts_with_its_gradient_its_state_and_the_model_s_own(architectures: Any) -> None:
    llama = architectures["llama"]
    text = (
        'model "given" { task = causal_lm }\ntrain model.layers.1.mlp.**\nstep { optimizer = adamw(lr = 1)  batch = 4 }'
    )
    step = surgery.compile(surgery.parse(text), model=llama.model())
    trained = 4 * sum(whole.numbers for whole in step.plan.trained)
    found = predicted(step, LENGTH)
    assert found.trained == trained and found.optimizer >= 2 * trained
    assert found.weights >= 4 * step.plan.totals.model  # the step has a copy of what it writes
    assert found.gradients <= trained
    assert measured(step, step.weights, others(step), batch_of(llama)) == predicted(step, LENGTH, "cpu")


def test_the_plan_of_a_skeleton_has_that_of_the_step(architectures: Any) -> None:
    llama = architectures["llama"]
    program = surgery.parse(llama.spec("lora(rank = 2)", "optimizer = adamw(lr = 0.1)  batch = 4"))
    with torch.device("meta"):
        skeleton = llama.factory(0.0)
    plan = surgery.plan(program, skeleton, memory=True)
    assert plan.memory == predicted(surgery.compile(program, model=llama.model()), plan.tokens // 4)
    assert plan.memory is not None and plan.memory.rows * plan.memory.length == plan.tokens
    assert surgery.plan(program, skeleton).memory is None


def test_attention_of_a_gpu_forms_no_square_matrix(architectures: Any) -> None:
    """Twice the length takes twice the memory; a `[length, length]` matrix would take four times as much."""
    for name, step in (("llama", "batch = 4"), ("bert", "batch = 4")):
        made = compiled(architectures[name], step=step, max_position_embeddings=4096, dropout=0.1)
        short, long = (predicted(made, length) for length in (1024, 2048))
        if name == "llama":
            assert long.kept == pytest.approx(2 * short.kept, rel=0.01)
        assert long.blocks.keys() == short.blocks.keys()


def test_recompute_takes_less_by_what_the_blocks_keep(architectures: Any) -> None:
    found: list[MemoryPlan] = []
    for word in ("none", "budget(0.5)", "blocks"):
        step = compiled(architectures["llama"], step=f"batch = 4  recompute = {word}", num_hidden_layers=8)
        found.append(predicted(step, 64))
    none, half, blocks = found
    assert blocks.peak < half.peak < none.peak
    assert none.kept > 10 * blocks.kept
    assert half.kept - blocks.kept <= 0.55 * (none.kept - blocks.kept)


def test_a_storage_counts_as_long_as_somebody_holds_it() -> None:
    storages = Storages()
    x = torch.ones(256, requires_grad=True)
    storages.add(x, "weights")
    with storages:
        y = x * 2
        part = y[:3].detach()
        z = y.exp()
        del y
        assert storages.now.total() == 3 * 1024  # of x, y through its part, z
        del part, z
        assert +storages.now == {"weights": 1024}
        with storages.labelled("inside"):
            z = (x * 2).exp()
        assert storages.now["inside"] == 1024  # the result is kept for the backward, the product is not
        z.sum().backward()  # type: ignore[no-untyped-call]
        del z
    assert storages.now["inside"] == 0 and storages.now["backward"] == 1024  # the gradient
    assert storages.most >= 3 * 1024


def test_a_model_that_cannot_be_captured_says_so(architectures: Any) -> None:
    class Branching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.linear(x) if float(x.sum()) > 0 else x
            return found

    model = Branching()
    plan = surgery.plan(surgery.parse("adapt linear { with lora(rank = 2) } step { loss = mse }"), model)
    with pytest.raises(surgery.SurgError) as raised:
        of_plan(plan, model, {"x": torch.ones(3, 4)})
    assert [found.code for found in raised.value.diagnostics] == ["SURG040"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "t5"])
def test_a_compiled_step_is_counted_as_the_compiler_splits_it(name: str, architectures: Any) -> None:
    architecture = architectures[name]
    step = compiled(architecture, step="batch = 4  recompute = budget(0.5)", dropout=0.1)
    found = predicted(step, LENGTH)
    assert found.compiled  # `compile = auto`, on a GPU
    step.plan = step.plan.model_copy(update={"step": step.plan.step.model_copy(update={"compile": "off"})})
    plain = predicted(step, LENGTH)
    assert not plain.compiled
    assert found.kept < plain.kept and found.weights == plain.weights and found.optimizer == plain.optimizer


@pytest.mark.usefixtures("partitioned_alone")
def test_what_compiled_blocks_keep_is_what_they_keep(architectures: Any) -> None:
    llama = architectures["llama"]
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16, "num_hidden_layers": 4}
    step = compiled(llama, "lora(rank = 2)  strategy = branch", "batch = 4  compile = on", **sizes)
    with FakeTensorMode():
        weights, model = without_storage(step)
        batch = {name: torch.empty_like(tensor) for name, tensor in batch_of(llama).items()}
        found = measured(step, weights, model, batch, compiled=True)
    hooks = Kept([*step.weights.values()])
    with hooks:
        step._namespace["forward"](step.weights, **llama.inputs(4, LENGTH), training=True)
    of_the_blocks = [tensor for tensor in hooks.tensors if tensor.shape[-1] != 97]
    assert found.kept == pytest.approx(sum(tensor.untyped_storage().nbytes() for tensor in of_the_blocks), rel=0.05)
