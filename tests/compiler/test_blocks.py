"""`recompute`: the chosen blocks are run again, keep less and change no number; what cannot be is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import surgery
from surgery.compiler import p5_capture, pipeline
from surgery.compiler.algebra.cost import Kept
from surgery.compiler.blocks import stacks
from surgery.compiler.graph import Graph, tensors
from surgery.compiler.plan import Plan
from surgery.compiler.skeleton import Skeleton
from surgery.runtime.initialise import initialise
from surgery.runtime.step import TrainingStep

WORDS = ("none", "blocks", "budget(0.5)")


def program(rule: str, recompute: str, more: str = "optimizer = adamw(lr = 1e-2)  batch = 4") -> surgery.Program:
    return surgery.parse(f"{rule}\nstep {{ {more}  steps = 8\n    recompute = {recompute}\n}}\n")


def step_of(model: nn.Module, graph: Graph, given: surgery.Program) -> TrainingStep:
    plan = pipeline.resolve(given, model)
    return TrainingStep(plan, pipeline.adapt(plan, graph, initialise(plan, tensors(graph.module))), model)


def rule(architecture: Any) -> str:
    return str(architecture.spec("lora(rank = 2, dropout = 0.1)").partition("step")[0])


def after_two_steps(step: TrainingStep, batch: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(5)
    losses = [step(batch).loss for _ in range(2)]
    return [*losses, *(tensor.detach() for tensor in step.state_dict()["weights"].values())]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)


# --- which blocks -----------------------------------------------------------------------------------------------------


def chosen(architecture: Any, recompute: str, **settings: Any) -> tuple[str, ...]:
    plan: Plan = surgery.plan(program(rule(architecture), recompute), architecture.model(**settings))
    return plan.recomputed


@pytest.mark.parametrize(
    ("recompute", "indices"),
    [
        ("none", []),
        ("budget(1)", []),
        ("blocks", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("budget(0)", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("budget(0.5)", [0, 2, 4, 6]),
        ("budget(0.25)", [0, 1, 2, 4, 5, 6]),
        ("budget(0.3)", [0, 1, 2, 4, 5, 6]),
        ("budget(0.75)", [0, 4]),
        ("budget(share = 0.1)", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_a_budget_is_spread_evenly(recompute: str, indices: list[int], architectures: Any) -> None:
    paths = chosen(architectures["llama"], recompute, num_hidden_layers=8)
    assert paths == tuple(f"model.layers.{index}" for index in indices)


def test_blocks_that_are_not_alike_count_for_themselves(architectures: Any) -> None:
    text = 'model "given" { task = causal_lm }\nadapt model.layers.[0..3].self_attn.q_proj { with lora(rank = 2) }'
    plan = surgery.plan(program(text, "budget(0.5)"), architectures["llama"].model(num_hidden_layers=8))
    assert plan.recomputed == tuple(f"model.layers.{index}" for index in (0, 2, 4, 6))
    assert chosen(architectures["t5"], "blocks") == tuple(
        f"{side}.block.{index}" for side in ("encoder", "decoder") for index in (0, 1)
    )


class Stage(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width // 2, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class Stages(nn.Module):
    """Lists in a list whose own entries differ."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stage(8), Stage(16)])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def test_stages_of_other_sizes_are_looked_into() -> None:
    model = Stages()
    found = [[path.rpartition(".")[0] for path in blocks][0] for blocks in stacks(Skeleton(model))]
    assert found == ["stages.0.blocks", "stages.1.blocks"]
    graph = p5_capture.run(model, {"x": torch.randn(3, 4)}, None)
    text = "adapt stages.*.blocks.*.0 { with lora(rank = 2) }"
    runs = []
    for word in WORDS:
        step = step_of(model, graph, program(text, word, "loss = mse  batch = 4"))
        assert step.source.count("checkpoint(") == {"none": 0, "blocks": 6, "budget(0.5)": 4}[word]
        runs.append(after_two_steps(step, {"x": torch.ones(4, 4), "labels": torch.ones(4, 16)}))
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "deberta_v2", "t5", "qwen3_moe"])
def test_losses_and_weights_are_the_same_to_the_bit(name: str, architectures: Any, captured: Any) -> None:
    architecture = architectures[name]
    model = architecture.model(dropout=0.1)
    graph = p5_capture.run(model, architecture.inputs(2, 5), architecture.task)
    batch = {**architecture.inputs(4, 9), "labels": architecture.labels(4, 9)}
    runs = []
    for word in WORDS:
        step = step_of(model, graph, program(rule(architecture), word))
        runs.append(after_two_steps(step, batch))
        again = [line for line in step.source.splitlines() if "checkpoint(" in line]
        assert bool(again) == (word != "none")
        if name != "llama":  # its layers draw no random numbers, but where the method does
            assert step.source.count("preserve_rng_state=True") == len(again)
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])


def test_micro_batches_autocast_and_evaluation(architectures: Any) -> None:
    llama = architectures["llama"]
    model = llama.model()
    graph = p5_capture.run(model, llama.inputs(2, 5), llama.task)
    text = llama.spec("lora(rank = 2)").partition("step")[0]
    batch = {**llama.inputs(4, 9), "labels": llama.labels(4, 9)}
    runs = []
    for word in WORDS:
        more = "optimizer = adamw(lr = 1e-2)  batch = 4  micro_batch = 3  precision = bfloat16"
        step = step_of(model, graph, program(text, word, more))
        assert step.source.count("preserve_rng_state=False") == (word != "none")
        found = after_two_steps(step, batch)
        kept = Kept([])
        with kept:
            found.append(step.evaluate_loss(batch)[0])
        assert kept.bytes == 0
        runs.append(found)
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])


@pytest.mark.parametrize("strategy", ["branch", "fold", "recompute"])
def test_sites_that_are_recomputed_themselves(strategy: str, architectures: Any) -> None:
    llama = architectures["llama"]
    model = llama.model()
    graph = p5_capture.run(model, llama.inputs(2, 5), llama.task)
    text = llama.spec(f"lora(rank = 2)  strategy = {strategy}").partition("step")[0]
    batch = {**llama.inputs(4, 9), "labels": llama.labels(4, 9)}
    none, blocks = (after_two_steps(step_of(model, graph, program(text, word)), batch) for word in WORDS[:2])
    assert_equal(none, blocks)


def test_a_block_keeps_its_inputs_alone(architectures: Any) -> None:
    llama, layers = architectures["llama"], 8
    model = llama.model(num_hidden_layers=layers)
    graph = p5_capture.run(model, llama.inputs(2, 5), llama.task)
    inputs, text = llama.inputs(4, 9), llama.spec("lora(rank = 2)").partition("step")[0]
    kept = {}
    for word in (*WORDS, "budget(0.75)"):
        step = step_of(model, graph, program(text, word))
        hooks = Kept([*step.weights.values()])
        with hooks:
            step._namespace["forward"](step.weights, *inputs.values(), training=True)
        kept[word] = hooks.bytes
    hidden = 4 * 9 * 32 * 4
    around = kept["blocks"] - (layers - 1) * hidden  # checkpoint itself holds what goes into the block after block 0
    assert around < 6 * hidden
    for share in (0.5, 0.75):
        assert kept[f"budget({share})"] - kept["blocks"] <= share * 1.05 * (kept["none"] - kept["blocks"])


def test_compiled_blocks_are_compiled_once(architectures: Any) -> None:
    """The run in the backward takes the code of the first run."""
    llama = architectures["llama"]
    model = llama.model(num_hidden_layers=4)
    graph = p5_capture.run(model, llama.inputs(2, 5), llama.task)
    text = llama.spec("lora(rank = 2)").partition("step")[0]
    batch = {**llama.inputs(4, 9), "labels": llama.labels(4, 9)}
    results, compiled = [], []
    for word in WORDS[:2]:
        torch._dynamo.reset()
        step, count = step_of(model, graph, program(text, word)), 0

        def counting(module: Any, example: Any) -> Any:
            nonlocal count
            count += 1
            return module

        (name,) = step._namespace["COMPILED"]
        step._namespace[name] = torch.compile(step._namespace[name], backend=counting, dynamic=True)
        results.append(after_two_steps(step, batch))
        compiled.append(count)
    assert compiled[1] == compiled[0] <= 2
    assert_equal(*results)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def kept_and_products(step: TrainingStep, inputs: dict[str, Tensor]) -> tuple[int, dict[str, int]]:
    """What a forward keeps, and the products of its backward."""
    hooks, run = Kept([*step.weights.values()]), Operations()
    with hooks:
        logits = step._namespace["forward"](step.weights, *inputs.values(), training=True)
    with run:
        logits.float().square().sum().backward()
    heavy = ("mm", "addmm", "bmm", "low_rank", "attention")
    return hooks.bytes, {name: count for name, count in run.counts.items() if any(word in name for word in heavy)}


@pytest.mark.usefixtures("partitioned_alone")
def test_compiled_blocks_keep_products_alone(architectures: Any) -> None:
    """The adapter's x is had again from what is kept anyway, for no product and no attention more than without."""
    llama = architectures["llama"]
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16, "num_hidden_layers": 3}
    model = llama.model(**sizes).bfloat16()
    graph = p5_capture.run(model, llama.inputs(2, 5), llama.task)
    text = (
        'model "given" { task = causal_lm }\nadapt model.layers.*.**: Linear { with lora(rank = 2)  strategy = branch }'
    )
    inputs = llama.inputs(4, 16)
    step = step_of(model, graph, program(text, "none", "compile = off"))
    eager, products = kept_and_products(step, inputs)
    step._namespace["compile_forward"]()
    less, again = kept_and_products(step, inputs)
    assert again == products
    step = step_of(model, graph, program(text, "none", "compile = off"))
    source = step.source.replace("backend=keeping_less, ", 'backend="aot_eager_decomp_partition", ')
    assert source != step.source
    step.use_source(source)
    step._namespace["compile_forward"]()
    torch._dynamo.reset()
    usual, again = kept_and_products(step, inputs)
    assert again == products
    block = 2 * 4 * 16 * 64 * 3  # the stream of one block in bfloat16, for three blocks
    assert less < usual - 5 * block < eager


# --- what a block writes ----------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A block with running statistics, and one that reads what it writes."""

    scale: Tensor

    def __init__(self, moving: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.moving = nn.Linear(6, 6), nn.BatchNorm1d(6), moving
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.moving:
            self.scale.mul_(1.01)
            x = x * self.scale
        found: Tensor = x + self.norm(torch.tanh(self.linear(x)))
        return found


class Tower(nn.Module):
    def __init__(self, moving: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Normed(moving) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


NORMED = "adapt layers.*.linear { with lora(rank = 2) }"


def test_running_statistics_move_once() -> None:
    torch.manual_seed(0)
    model = Tower()
    graph = p5_capture.run(model, {"x": torch.randn(3, 6)}, None)
    batch = {"x": torch.randn(4, 6), "labels": torch.randn(4, 6)}
    none, blocks = (
        after_two_steps(step_of(model, graph, program(NORMED, word, "loss = mse  batch = 4  micro_batch = 2")), batch)
        for word in WORDS[:2]
    )
    assert len(none) > 2 + 3 * 2  # the statistics are among what is compared
    assert_equal(none, blocks)


def test_a_block_that_reads_what_it_writes_is_refused() -> None:
    model = Tower(moving=True)
    graph = p5_capture.run(model, {"x": torch.randn(3, 6)}, None)
    step_of(model, graph, program(NORMED, "none", "loss = mse  batch = 4"))
    with pytest.raises(surgery.SurgError) as raised:
        step_of(model, graph, program(NORMED, "blocks", "loss = mse  batch = 4"))
    (found,) = raised.value.diagnostics
    assert found.code == "SURG038" and "layers.0.scale" in found.message and found.span is not None


class Crossed(nn.Module):
    """Two blocks of which neither can run first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = cast(Iterable[nn.Sequential], self.layers)
        found: Tensor = first[1](second[1](second[0](first[0](x))))
        return found


def test_blocks_that_are_mixed_are_refused() -> None:
    model = Crossed()
    graph = p5_capture.run(model, {"x": torch.randn(3, 6)}, None)
    with pytest.raises(surgery.SurgError) as raised:
        step_of(model, graph, program("adapt layers.*.0 { with lora(rank = 2) }", "blocks", "loss = mse  batch = 4"))
    assert [found.code for found in raised.value.diagnostics] == ["SURG038"]


def test_a_model_without_a_list_is_refused() -> None:
    with pytest.raises(surgery.SurgError) as raised:
        surgery.plan(program("adapt 0 { with lora(rank = 2) }", "blocks"), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    assert [found.code for found in raised.value.diagnostics] == ["SURG038"]
    assert raised.value.diagnostics[0].span.text == "blocks"  # type: ignore[union-attr]
