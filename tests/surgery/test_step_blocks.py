"""Several `step` blocks: each moves what it says with an optimizer of its own, and the run's clock goes on."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo import lookup_backend

import surgery
from surgery.compiler.memory import of_plan
from surgery.compiler.plan import Plan
from surgery.runtime.data import block_of, streams_of
from surgery.runtime.run_folder import is_run, load_state
from surgery.runtime.step import TrainingStep
from surgery.runtime.train import train
from tests import loop
from tests.surgery.test_crashes import killed

Batch = dict[str, Tensor]
RANK, SCALE = 2, 3.0


class Network(nn.Module):
    """Two hidden layers with dropout between them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.dropout(torch.tanh(self.second(torch.tanh(self.first(x))))))
        return y


def compiled(blocks: str, rules: str = "", model: nn.Module | None = None) -> TrainingStep:
    rules = rules or f"adapt {{first,second}} {{ with lora(rank = {RANK}, alpha = {RANK * SCALE}) }}\ntrain last"
    if model is None:
        torch.manual_seed(0)
        model = Network().double()
    inputs = {"x": torch.zeros(4, 5, dtype=next(model.parameters()).dtype)}
    return surgery.compile(surgery.parse(f"{rules}\n{blocks}"), model=model, example_inputs=inputs, device="cpu")


def batch(number: int, rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    return {"x": x, "labels": torch.randint(3, (rows,), generator=generator)}


def state(step: TrainingStep) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in step.state_dict()["weights"].items()}


def moved(step: TrainingStep, steps: int) -> set[str]:
    """Names of what some steps move."""
    before = state(step)
    for _ in range(steps):
        step(batch(step.step))
    return {name for name, value in state(step).items() if not torch.equal(value, before[name])}


# --- against torch ----------------------------------------------------------------------------------------------------

BLOCKS = """
step {
    train last { lr = 0.03  weight_decay = 0.2 };  train second
    optimizer = adamw(lr = 0.02, weight_decay = 0.1)  schedule = linear(warmup = 2)
    batch = 6  clip = 0.5  loss = cross_entropy  steps = 4
}
step { freeze **.A;  freeze last.bias;  optimizer = sgd(lr = 0.3, momentum = 0.9)  schedule = cosine  steps = 5 }
step { steps = 3  schedule = constant }
"""


def reference(model: nn.Module, tensors: dict[str, Tensor], number: int) -> list[dict[str, Tensor]]:
    """The tensors after each step of a loop over torch's optimizers, one for each block."""
    given = {name: value.detach() for name, value in model.named_parameters()}
    w = {name: value.clone().requires_grad_() for name, value in tensors.items()}

    def forward(x: Tensor) -> Tensor:
        for layer in ("first", "second"):
            low = x @ w[f"{layer}.A"].T @ w[f"{layer}.B"].T
            x = torch.tanh(x @ given[f"{layer}.weight"].T + given[f"{layer}.bias"] + SCALE * low)
        return x @ w["last.weight"].T + w["last.bias"]

    last, every = ["last.weight", "last.bias"], [f"{layer}.{name}" for layer in ("first", "second") for name in "AB"]
    blocks: list[Any] = [
        (4, [(last, 0.03, 0.2), (["second.A", "second.B"], 0.02, 0.1)],
         lambda groups: torch.optim.AdamW(groups), lambda t: t / 2 if t < 2 else (4 - t) / 2),
        (5, [(["first.B", "second.B", "last.weight"], 0.3, 0.0)],
         lambda groups: torch.optim.SGD(groups, momentum=0.9), lambda t: 0.5 * (1 + math.cos(math.pi * t / 5))),
        (3, [([*every, *last], 0.3, 0.0)], lambda groups: torch.optim.SGD(groups, momentum=0.9), lambda t: 1.0),
    ]  # fmt: skip
    found, step = [], 0
    for steps, groups, make, factor in blocks:
        own = [{"params": [w[name] for name in names], "lr": lr, "weight_decay": decay} for names, lr, decay in groups]
        optimizer, rates = make(own), [lr for _, lr, _ in groups]
        for t in range(steps):
            for tensor in w.values():
                tensor.grad = None
            given_batch = batch(step)
            F.cross_entropy(forward(given_batch["x"]), given_batch["labels"]).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_([tensor for group in own for tensor in group["params"]], 0.5)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(t)
            optimizer.step()
            found.append({name: value.detach().clone() for name, value in w.items()})
            step += 1
    return found[:number]


def test_each_block_is_a_loop_over_torchs_optimizer() -> None:
    step = compiled(BLOCKS)
    expected = reference(step.model, state(step), 12)
    for number, weights in enumerate(expected):
        step(batch(number))
        torch.testing.assert_close(state(step), weights, rtol=1e-12, atol=1e-12)
    assert step.step == step.steps == 12


def test_compiled_blocks_take_the_same_steps() -> None:
    """Torch's compiler looks at what requires gradients: none of the adapters at first, then all."""
    blocks, rules = "step { train last  loss = cross_entropy  steps = 2 } step { steps = 1 }", "train last"
    rules += "\nadapt second { with lora(rank = 2) }"
    plain, fast = compiled(blocks, rules), compiled(blocks, rules)
    fast._namespace["keeping_less"] = lookup_backend("aot_eager")  # its graphs are those that would be compiled
    fast._namespace["compile_forward"]()
    for number in range(3):
        torch.testing.assert_close(fast(batch(number)).loss, plain(batch(number)).loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(state(fast), state(plain), rtol=1e-12, atol=1e-12)


def test_what_rests_does_not_move_and_costs_no_gradient() -> None:
    """LoRA-FA, then LoRA: with momentum and weight decay, A stays to the bit for as long as it is frozen."""
    settings = "optimizer = sgd(lr = 0.1, momentum = 0.9, weight_decay = 0.1)  loss = cross_entropy"
    step = compiled(f"step {{ steps = 2  {settings} }} step {{ steps = 3  freeze **.A }} step {{ steps = 2 }}")
    assert moved(step, 2) == set(step.state_dict()["weights"])
    learning = {name for name, tensor in step.weights.items() if tensor.requires_grad}
    assert learning == {"first.B", "second.B", "last.weight", "last.bias"}
    assert moved(step, 3) == learning
    assert all(tensor.grad is None for tensor in step.weights.values())
    assert moved(step, 2) == set(step.state_dict()["weights"])


def test_parameters_are_trained_in_one_block_alone() -> None:
    blocks = "step { train last.bias  loss = cross_entropy } step {} step { train last }"
    step = compiled(blocks, "adapt first { with lora(rank = 2) }")
    step.lengths = (2, 2, 1)
    assert [entry.name for entry in step.plan.trained] == ["last.bias", "last.weight"]
    assert moved(step, 2) == {"last.bias"}
    assert moved(step, 2) == {"first.A", "first.B"}
    assert moved(step, 1) == {"last.weight", "last.bias"}


def test_a_tied_parameter_is_frozen_by_any_of_its_names() -> None:
    """Also one that a block alone trains, and beside others."""
    torch.manual_seed(0)
    model = Network().double()
    model.extra = nn.Linear(6, 6, bias=False)  # the forward knows it as `second`
    model.extra.weight = model.second.weight
    block = "step { train {second,last}  freeze {extra,last.bias}  steps = 2  loss = cross_entropy }"
    step = compiled(f"{block} step {{ steps = 1 }}", "adapt first { with lora(rank = 2) }", model)
    assert moved(step, 2) == {"second.bias", "last.weight"}


def test_what_no_block_moves_is_frozen() -> None:
    step = compiled("step { freeze **.A;  freeze last.bias  loss = cross_entropy }")
    assert [tensor.role for tensor in step.plan.sites[0].tensors] == ["frozen", "train"]
    assert [entry.name for entry in step.plan.trained] == ["last.weight"]
    assert (step.plan.totals.trainable, step.plan.totals.frozen) == (2 * RANK * 6 + 18, RANK * (5 + 6))
    assert "BLOCKS" not in step.source
    assert moved(step, 2) == {"first.B", "second.B", "last.weight"}


# --- the clock --------------------------------------------------------------------------------------------------------

NOISY = """
method noisy(rank: int = 2) {
    A = train kaiming_uniform[rank, in];  B = train zeros[out, rank];  seen = state zeros[2]
    delta = B @ A + training * stop(0.1 * cosine_up(step, steps) * gaussian(step)[out, in])
    penalty = 0.1 * sum(A ** 2) * step / steps
    after step when step % 2 == 1 { seen = seen + step / steps }
    every 3 steps { reset A }
}
adapt first { with noisy() }
train last
"""
METHODS = {
    "noisy": NOISY,
    "literal": "adapt {first,second} { with delta_lora(rank = 2, ratio = 0.5, start = 1)  update = literal }",
    "telescope": "adapt {first,second} { with delta_lora(rank = 2, ratio = 0.5, start = 1)  update = telescope }",
    "adalora": "adapt {first,second} { with adalora(rank = 3, target = 1, warmup = 1, cooldown = 2, interval = 1) }",
    "resting": "adapt {first,second} { with lora(rank = 2)  active = random(1, every = 2) }",
}


@pytest.mark.parametrize("method", METHODS)
def test_the_clock_of_methods_does_not_know_blocks(method: str) -> None:
    """With an optimizer that remembers nothing, blocks of equal settings are one block, to the bit."""
    settings = "optimizer = sgd(lr = 0.2)  loss = cross_entropy"
    one = compiled(f"step {{ steps = 7  {settings} }}", METHODS[method])
    several = compiled(f"step {{ steps = 3  {settings} }} step {{ steps = 2 }} step {{ steps = 2 }}", METHODS[method])
    for number in range(7):
        expected, found = one(batch(number)), several(batch(number))
        assert torch.equal(found.loss, expected.loss) and torch.equal(found.penalty, expected.penalty)
        assert all(torch.equal(value, state(one)[name]) for name, value in state(several).items())
    assert several.block == 2


def test_a_weight_rests_with_the_factors_that_move_it() -> None:
    step = compiled(
        "step { steps = 3  loss = cross_entropy } step { steps = 2  freeze first } step { steps = 2  train last }",
        f"{METHODS['literal']}\ntrain last",
    )
    assert {"first.weight", "second.weight"} < moved(step, 3)
    assert moved(step, 2) == {"second.A", "second.B", "second.weight", "last.weight", "last.bias"}
    assert moved(step, 2) == {"last.weight", "last.bias"}


def test_a_penalty_of_what_rests_is_reported() -> None:
    rules = "method small() { b = train constant(0.5)[out];  output = y + b;  penalty = sum(b ** 2) }"
    step = compiled("step { train last  steps = 2  loss = cross_entropy } step { steps = 1 }",
                    f"{rules}\nadapt first {{ with small() }}\ntrain last")  # fmt: skip
    assert step(batch(0)).penalty == pytest.approx(6 * 0.25)
    assert moved(step, 1) == {"last.weight", "last.bias"}
    assert "first.b" in moved(step, 1)


def test_lengths_that_are_not_known_are_asked_for() -> None:
    step = compiled("step { steps = 2  loss = cross_entropy } step { epochs = 2 }")
    with pytest.raises(surgery.SurgError, match="the end of a block needs the number of steps"):
        step(batch(0))
    with pytest.raises(surgery.SurgError, match=r"2 `step` blocks"):
        step.steps = 4
    step.lengths = (1, 3)
    step(batch(0))
    assert (step.steps, step.block) == (4, 1)


def test_an_optimizer_takes_what_its_block_moves() -> None:
    """A pair is known to the block where both of its tensors move, half of one where one is frozen."""
    blocks = """
    step { steps = 2  freeze **.A  optimizer = lora_fa(adamw(lr = 0.01))  loss = cross_entropy }
    step { steps = 2  optimizer = riemannian(sgd(lr = 0.01)) }
    step { steps = 2  train last  optimizer = adamw(lr = 0.01) }
    """
    step = compiled(blocks)
    assert [len(block.factors) for block in step.plan.blocks] == [2, 2, 0]
    assert [moved(step, 2) for _ in range(3)] == [
        {"first.B", "second.B", "last.weight", "last.bias"},
        set(step.state_dict()["weights"]),
        {"last.weight", "last.bias"},
    ]


def test_blocks_share_the_functions_that_are_alike() -> None:
    blocks = "step { steps = 2  clip = 1  loss = cross_entropy } step { steps = 1  optimizer = adamw(lr = 0.1) }"
    source = compiled(f"{blocks} step {{ steps = 3  micro_batch = 2 }}").source
    assert "(make_optimizer, schedule, train_step)," in source
    assert "(make_optimizer_in_block_2, schedule, train_step)," in source
    assert "(make_optimizer_in_block_2, schedule, train_step_in_block_3)," in source
    functions = [line.split("(")[0].removeprefix("def ") for line in source.splitlines() if line.startswith("def ")]
    assert [name for name in functions if name.startswith(("gradients", "train"))] == [
        "gradients", "train_step", "gradients_in_block_3", "train_step_in_block_3",
    ]  # fmt: skip


# --- runs -------------------------------------------------------------------------------------------------------------


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two states of steps, to the bit."""
    assert found["step"] == expected["step"] and found["block"] == expected["block"]
    assert all(torch.equal(value, expected["weights"][name]) for name, value in found["weights"].items())
    torch.testing.assert_close(found["optimizer"], expected["optimizer"], rtol=0, atol=0)


@pytest.mark.parametrize("done", range(8))
def test_a_state_goes_on_to_the_bit(done: int) -> None:
    blocks = """
    step { train last  optimizer = adamw(lr = 0.02)  schedule = linear  loss = cross_entropy  steps = 3 }
    step { steps = 4  freeze second  optimizer = sgd(lr = 0.1, momentum = 0.9) }
    """
    steps = []
    for _ in range(2):
        torch.manual_seed(0)
        steps.append(compiled(blocks, model=Network(dropout=0.3).double()))
    whole, resumed = steps
    losses = [whole(batch(number)).loss for number in range(done)]
    saved = copy.deepcopy(whole.state_dict())
    losses = [whole(batch(number)).loss for number in range(done, 7)]
    resumed.load_state_dict(saved)
    assert resumed.block == (0 if done < 3 else 1)
    assert [float(resumed(batch(number)).loss) for number in range(done, 7)] == list(map(float, losses))
    check_same(resumed.state_dict(), whole.state_dict())


class Words(nn.Module):
    """A class for rows of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(16, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.dropout = nn.Dropout(0.2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mean = (self.embedding(input_ids) * attention_mask[..., None]).mean(1)
        y: Tensor = self.head(self.dropout(torch.tanh(self.inner(mean))))
        return y


RUN = """
adapt inner { with lora(rank = 2) }
step {
    train head  optimizer = adamw(lr = 0.05)  schedule = linear(warmup = 0.5)  loss = cross_entropy
    batch = 3  epochs = 1  save = every(2, keep = 3)  evaluate = every(4)  log = every(1)
}
step { train head;  train inner  optimizer = sgd(lr = 0.2, momentum = 0.9)  batch = 5  micro_batch = 2  epochs = 1.5 }
step { steps = 3  save = every(1)  clip = 0.5 }
"""


class Interrupted(TrainingStep):
    """Gets Ctrl-C in one of its steps."""

    at: int | None = None

    def __call__(self, batch: Any) -> Any:
        if self.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__call__(batch)


def words() -> Interrupted:
    torch.manual_seed(0)
    tokens = torch.ones(2, 2, dtype=torch.long)
    inputs = {"input_ids": tokens, "attention_mask": tokens}
    step = surgery.compile(surgery.parse(RUN), model=Words(), example_inputs=inputs)
    step.__class__ = Interrupted
    step.lengths = (3, 3, 3)
    assert isinstance(step, Interrupted)
    return step


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    train(words(), loop.data(), run, progress=False)
    return run


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 6, 8])
def test_a_run_is_resumed_to_the_bit(unbroken: Path, tmp_path: Path, at: int) -> None:
    """Interrupted in a block, or in the last step of one: the state is then that between two blocks."""
    step = words()
    step.at = at
    outcome = train(step, loop.data(), tmp_path, progress=False)
    assert (outcome.done, outcome.interrupted) == (at + 1, at < 8)
    assert load_state(tmp_path).state["block"] == min((at + 1) // 3, 2)
    go_on(tmp_path)
    check_run(tmp_path, unbroken)


def go_on(run: Path) -> None:
    """What a user does after a crash: begin, or continue what is there."""
    step = words()
    if is_run(run):
        step.load_state_dict(load_state(run).state)
    train(step, loop.data(), run, resume=step.step > 0, progress=False)


def check_run(run: Path, expected: Path) -> None:
    """Two runs that are over, to the bit."""
    for file in ("adapters.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(run / file), load_file(expected / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert loop.losses(run) == loop.losses(expected)
    assert load_state(run).extra == load_state(expected).extra


def test_a_run_is_not_resumed_with_blocks_of_other_lengths(unbroken: Path, tmp_path: Path) -> None:
    """As many steps in all, but others in each block."""
    shutil.copytree(unbroken / "saves" / "step-000004", tmp_path / "run")
    step = words()
    step.load_state_dict(load_state(tmp_path / "run").state)
    step.lengths = (3, 4, 2)
    with pytest.raises(surgery.SurgError, match="begun with blocks of other lengths"):
        train(step, loop.data(), tmp_path / "run", resume=True, progress=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share what is imported")
def test_a_run_that_is_killed_ends_as_an_unbroken_one(unbroken: Path, tmp_path: Path) -> None:
    """Killed again and again, each time a little later behind where it went on: within blocks and between them."""
    kills = 0
    while killed(lambda: go_on(tmp_path), tmp_path, 25 + 5 * kills):
        kills += 1
    assert kills > 5
    check_run(tmp_path, unbroken)


def test_a_run_follows_the_settings_of_its_blocks(unbroken: Path) -> None:
    rows = [json.loads(row) for row in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 3, 5, 7, 8]  # every 4, and at a block's end
    assert [round(row["lr"], 6) for row in rows] == [0, 0.025, 0.05, 0, 0.1, 0.2, 0, 0.1, 0.2]
    assert ["gradient_norm" in row for row in rows] == [False] * 6 + [True] * 3
    saves = sorted(path.name for path in (unbroken / "saves").iterdir())
    assert saves == ["step-000002", "step-000004", "step-000006"]  # the last block keeps none beside the present one


def test_each_block_begins_with_an_epoch_of_its_own() -> None:
    plan, data = words().plan, loop.data()
    streams = streams_of(plan, data.train, (4, 3, 3))
    lengths = (4, 3, 3)
    rows = [streams[block_of(step, lengths)].rows(step) for step in range(10)]
    assert [len(one) for one in rows] == [3, 3, 2, 3, 5, 3, 5, 5, 3, 5]
    epochs = [rows[0] + rows[1] + rows[2], rows[4] + rows[5], rows[7] + rows[8]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    orders = [stream.order(stream.position(step)[0]) for stream in streams for step in [stream.first]]
    assert all(first != second for first, second in pairwise(orders))
    assert [stream.position(stream.first) for stream in streams] == [(0, 0), (2, 0), (4, 0)]


# --- around it --------------------------------------------------------------------------------------------------------


def test_a_block_takes_settings_from_the_one_before_it() -> None:
    text = "step { optimizer = adamw(lr = 1)  batch = 4  clip = 2  steps = 3  seed = 7 } step { batch = 6 }"
    first, second, third = surgery.parse(f"{text} step {{ epochs = 2 }}").steps
    assert (second.batch, second.clip, second.steps, second.optimizer) == (6, 2, None, first.optimizer)
    assert (third.batch, third.epochs, third.seed, third.number) == (6, 2, 7, 2)


def test_a_plan_is_read_back() -> None:
    plan = compiled(BLOCKS).plan
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert [len(block.step.frozen) for block in plan.blocks] == [2, 3, 0]
    assert plan.blocks[0].trained[0].lr == 0.03 and plan.trained[0].lr is None


def test_the_memory_is_that_of_the_largest_block() -> None:
    settings = "optimizer = adamw(lr = 1)  loss = cross_entropy"
    texts = {"small": "train last  batch = 4096", "large": "freeze last  batch = 4096", "adapters": "batch = 512"}
    peaks = {}
    for name, text in {**texts, "all": "} step { ".join(texts.values())}.items():
        # alone, a block would not have what others train
        blocks = f"step {{ {settings}  {text} }}" + ("" if name == "all" else " step { batch = 1 }")
        made = compiled(blocks)
        peaks[name] = of_plan(made.plan, made.model, {"x": torch.zeros(4, 5, dtype=torch.float64)}).peak
    assert peaks["all"] == peaks["large"] > peaks["small"] > peaks["adapters"]  # what rests keeps nothing for it


def test_blocks_are_built_in_python() -> None:
    built = surgery.Program(
        surgery.adapt("first", surgery.method("lora", rank=2)),
        surgery.step(surgery.train("last", lr=0.1), steps=2),
        surgery.step(surgery.freeze("**.A"), steps=3),
    )
    assert [len(said.trained) + len(said.frozen) for said in built.moving] == [1, 1]
    assert str(surgery.parse(str(built))) == str(built)
