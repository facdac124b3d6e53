"""`surgery.TrainerCallback`: under `transformers.Trainer` a program with events trains as its compiled step does."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import surgery

pytestmark = pytest.mark.usefixtures("captured_once")

STEPS, BATCH, RATE, DECAY = 6, 4, 1e-2, 0.1
OPTIMIZER = f"optimizer = adamw(lr = {RATE}, weight_decay = {DECAY})  schedule = linear  clip = 1.0  batch = {BATCH}"
METHODS = {
    "lora": "lora(rank = 3)",
    "penalty": "kasa(rank = 3, beta = 0.1, gamma = 0.1)",
    "literal": "delta_lora(rank = 3, ratio = 2.0, start = 1)  update = literal",
    "telescope": "delta_lora(rank = 3, ratio = 2.0, start = 1)  update = telescope",
}


class Recorded(Trainer):
    """Rows in their order; `losses` has one loss per optimizer step, in the model's own dtype."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.parts: list[float] = []

    def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **named)
        self.parts.append(float(loss))
        return loss

    @property
    def losses(self) -> list[float]:
        size = self.args.gradient_accumulation_steps
        return [sum(self.parts[start : start + size]) for start in range(0, len(self.parts), size)]


def batches(architecture: Any, steps: int = STEPS) -> list[dict[str, Tensor]]:
    """Batches of all steps; in causal ones the rows have unequal numbers of labels."""
    rows = steps * BATCH
    whole = {**architecture.inputs(rows), "labels": architecture.labels(rows)}
    if architecture.task == "causal_lm":
        for row in range(rows):
            whole["labels"][row, : 1 + row % 5] = -100  # the first is never a label, but some versions count it
    return [{name: value[at : at + BATCH] for name, value in whole.items()} for at in range(0, rows, BATCH)]


def adapted(architecture: Any, method: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    program = surgery.parse(architecture.spec(method, OPTIMIZER))
    return surgery.apply(program, architecture.model(**settings).to(dtype))


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """The task's loss in the logits' dtype: transformers computes it in float32."""
    logits = outputs.logits
    if logits.ndim > 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def trainer(
    model: nn.Module, rows: list[dict[str, Tensor]], folder: Path, *, callbacks: list[Any] | None = None,
    kind: type[Recorded] = Recorded, **settings: Any,
) -> Recorded:  # fmt: skip
    options: dict[str, Any] = {
        "per_device_train_batch_size": BATCH, "max_steps": len(rows), "learning_rate": RATE, "weight_decay": DECAY,
        "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "logging_strategy": "no", "seed": 0,
    }  # fmt: skip
    examples = [{name: value[row] for name, value in batch.items()} for batch in rows for row in range(BATCH)]
    arguments = TrainingArguments(output_dir=str(folder), **options | settings)
    callbacks = [surgery.TrainerCallback(model)] if callbacks is None else callbacks
    double = next(model.parameters()).dtype == torch.float64
    return kind(
        model=model, args=arguments, train_dataset=examples, callbacks=callbacks,
        compute_loss_func=own_loss if double else None,
    )  # fmt: skip


def compiled(architecture: Any, method: str, rows: list[dict[str, Tensor]], dtype: torch.dtype) -> tuple[Any, Tensor]:
    """The compiled step after the same batches, and its losses."""
    program = surgery.parse(architecture.spec(method, OPTIMIZER))
    examples = {name: value for name, value in rows[0].items() if name != "labels"}
    step = surgery.compile(program, architecture.model().to(dtype), examples)
    step.steps = len(rows)
    return step, torch.tensor([float(step(batch).loss) for batch in rows], dtype=torch.float64)


def states_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "accumulated"),
    [(torch.float64, 1e-10, 1), (torch.float64, 1e-10, 2), (torch.float32, 2e-5, 2)],
)
def test_the_losses_and_the_weights_are_those_of_the_compiled_step(
    name: str, method: str, accumulated: int, dtype: torch.dtype, tolerance: float, architectures: Any, tmp_path: Path
) -> None:
    architecture = architectures[name]
    rows, method = batches(architecture), METHODS[method]
    step, expected = compiled(architecture, method, rows, dtype)
    model = adapted(architecture, method, dtype)
    training = trainer(
        model, rows, tmp_path,
        per_device_train_batch_size=BATCH // accumulated, gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    if name == "bert":  # its loss is a mean over a micro-batch, although its forward takes the number of all labels
        training.model_accepts_loss_kwargs = False
    training.train()
    found = torch.tensor(training.losses, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    own = model.state_dict()
    for key, value in step.state_dict()["weights"].items():
        torch.testing.assert_close(own[key], value, rtol=20 * tolerance, atol=20 * tolerance)
    if "delta_lora" in method:
        assert int(own["surgery_clock.steps_taken"]) == STEPS
        base = architecture.model().to(dtype).state_dict()
        moved = [key for key, value in base.items() if not torch.equal(own[key], value)]
        assert bool(moved) == ("literal" in method)
    else:
        assert any("clock" in key for key in own) == ("beta" in method)


@pytest.mark.parametrize(
    "method",
    [
        "adalora(rank = 4, target = 2, warmup = 1, cooldown = 2, interval = 1)",
        "relora(rank = 3, period = 2)",
        "dora_dynamic(rank = 4, target = 2, interval = 1)",
        "flat_lora(rank = 3, rho = 0.5)",
    ],
)
def test_procedures_are_those_of_the_compiled_step(method: str, architectures: Any, tmp_path: Path) -> None:
    """Gradients after the step, masks over all sites, merges, and an optimizer that forgets."""
    architecture = architectures["llama"]
    rows = batches(architecture)
    step, expected = compiled(architecture, method, rows, torch.float64)
    model = adapted(architecture, method)
    training = trainer(model, rows, tmp_path)
    training.train()
    torch.testing.assert_close(torch.tensor(training.losses, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)
    own = model.state_dict()
    for key, value in step.state_dict()["weights"].items():
        if not key.startswith("shared."):  # numbers of the step, which have another name there
            torch.testing.assert_close(own[key], value, rtol=1e-7, atol=1e-9)


def test_an_event_behind_the_backward_is_refused(architectures: Any) -> None:
    method = """method late(rank: int = 2) { A = train normal(1.0)[rank, in];  B = train zeros[out, rank]
        s = state zeros[rank, in];  delta = B @ A;  after backward { s = grad(A) } }\n"""
    program = surgery.parse(method + architectures["llama"].spec("late()", OPTIMIZER))
    with pytest.raises(surgery.SurgError, match="SURG060"):
        surgery.apply(program, architectures["llama"].model())


KINDS = {
    "gpt2": "adapt transformer.h.*.attn.c_attn",
    "qwen3_moe": "adapt model.layers.*.mlp.experts.{gate_up_proj,down_proj}",
    "qwen2": "adapt lm_head",
}


@pytest.mark.parametrize("update", ["literal", "telescope"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_weight_is_found(name: str, update: str, architectures: Any, tmp_path: Path) -> None:
    """Transposed ones, stacks of experts, and a head that takes a weight of its own out of a tied pair."""
    architecture = architectures[name]
    untie = "untie" if name == "qwen2" else ""
    text = f'model "given" {{ task = causal_lm }}\n{KINDS[name]} {{ with delta_lora(rank = 2, start = 1)  {untie}  '
    text += f"update = {update} }}\nstep {{ {OPTIMIZER}  steps = {STEPS} }}"
    rows, dtype = batches(architecture), torch.float32 if "moe" in name else torch.float64  # experts have no float64
    step = surgery.compile(surgery.parse(text), architecture.model().to(dtype), {"input_ids": rows[0]["input_ids"]})
    expected = torch.tensor([float(step(batch).loss) for batch in rows], dtype=torch.float64)
    model: Any = surgery.apply(surgery.parse(text), architecture.model().to(dtype))
    embedding = model.get_input_embeddings().weight.clone()
    training = trainer(model, rows, tmp_path)
    training.train()
    found, tolerance = torch.tensor(training.losses, dtype=torch.float64), 2e-5 if "moe" in name else 1e-10
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(model.get_input_embeddings().weight, embedding)


SHARED = """
model "given" {{ task = causal_lm }}
method moving(rank: int = 2) {{
    A = train kaiming_uniform[rank, in] shared by model
    B = train zeros[out, rank]
    count = state zeros[1]
    delta = B @ A
    after step when step % 2 == 1 {{ count += 1;  W += 0.5 * (delta - prev(delta)) }}
}}
adapt model.layers.*.self_attn.{{q_proj,o_proj}} {{ with moving() + lora(rank = 2) }}
step {{ {optimizer}  steps = {steps} }}
"""


def test_states_shared_tensors_and_compositions(architectures: Any, tmp_path: Path) -> None:
    architecture, text = architectures["llama"], SHARED.format(optimizer=OPTIMIZER, steps=STEPS)
    rows = batches(architecture)
    step = surgery.compile(surgery.parse(text), architecture.model().double(), {"input_ids": rows[0]["input_ids"]})
    expected = torch.tensor([float(step(batch).loss) for batch in rows], dtype=torch.float64)
    model: Any = surgery.apply(surgery.parse(text), architecture.model().double())
    training = trainer(model, rows, tmp_path)
    training.train()
    torch.testing.assert_close(torch.tensor(training.losses, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)
    counts = [value for key, value in model.state_dict().items() if key.endswith("count")]
    assert len(counts) == 4
    assert all(float(count) == STEPS // 2 for count in counts)


class Plain(nn.Module):
    """Parameters without a module, one of them on the root."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.inner = nn.Parameter(torch.randn(6, 5)), nn.Linear(4, 4), cast(Any, nn.Module())
        self.inner.second = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x @ self.first.T @ self.inner.second.T)
        return logits


PLAIN = """
method counting(rank: int = 2) {
    A = train normal(0.5)[rank, out];  n = state zeros[1]
    output = y + y @ A.T @ A
    after step { n += 1 }
}
adapt {first,inner.second} { with delta_lora(rank = 2, start = 1)  update = literal }
adapt head { with counting() }
step { optimizer = adamw(lr = 1e-2)  loss = cross_entropy  steps = 5 }
"""


def test_a_clock_drives_parameters_and_outputs_in_an_own_loop() -> None:
    batches = [{"x": torch.randn(8, 5), "labels": torch.arange(8) % 4} for _ in range(5)]
    step = surgery.compile(surgery.parse(PLAIN), Plain(), {"x": batches[0]["x"]})
    model: Any = surgery.apply(surgery.parse(PLAIN), Plain())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model.surgery_clock.start(0, 5)
    for batch in batches:
        model.surgery_clock.begin(model)
        loss = nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model.surgery_clock.end()
        optimizer.zero_grad()
        torch.testing.assert_close(loss.detach(), step(batch).loss)
    own = model.state_dict()
    for name in ("first", "inner.second"):
        torch.testing.assert_close(own[name], step.weights[name])
        assert not torch.equal(own[name], Plain().state_dict()[name])
    assert float(own["head.n"]) == 5


def test_below_float32_the_literal_weight_is_rounded_once(architectures: Any, tmp_path: Path) -> None:
    architecture, path = architectures["llama"], "model.layers.1.self_attn.v_proj"
    model = adapted(architecture, METHODS["literal"], torch.bfloat16)
    rows = batches(architecture)
    trainer(model, rows, tmp_path).train()
    site = model.get_submodule(path)
    start = architecture.model().to(torch.bfloat16).get_submodule(path).weight
    moved = 2.0 * (site.B @ site.A - site.B_start @ site.A_start)  # alpha is the rank
    assert moved.abs().max() > 1e-3
    assert not torch.equal(site.weight, start)
    error = (site.weight.float() - (start.float() + moved)).abs()
    assert (error <= 2**-8 * site.weight.float().abs() + 1e-7).all()


@pytest.mark.parametrize("method", ["literal", "telescope"])
def test_a_resumed_training_is_exact(method: str, architectures: Any, tmp_path: Path) -> None:
    """From before the event's first step, from behind it, and in bfloat16, whose W is summed from the run's start."""
    architecture = architectures["llama"]
    rows, dtype = batches(architecture), torch.bfloat16 if method == "literal" else torch.float32

    def new() -> Any:
        return adapted(architecture, METHODS[method], dtype, dropout=0.1)

    model = new()
    whole = trainer(model, rows, tmp_path, save_strategy="steps", save_steps=1)
    whole.train()
    for done in (1, 2, 4):
        again = new()
        resumed = trainer(again, rows, tmp_path)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{done}"))
        assert resumed.losses == whole.losses[done:]
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key


class Overflowing(Recorded):
    """Gradients of the first two steps overflow, which accelerate's scaler finds."""

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        loss = super().training_step(*arguments, **named)
        if self.state.global_step < 2:
            next(value for value in self.model.parameters() if value.requires_grad).grad.fill_(torch.inf)  # type: ignore[union-attr]
        return loss


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_a_skipped_step_runs_no_event(optimizer: str, architectures: Any, tmp_path: Path) -> None:
    architecture, text = (
        architectures["llama"],
        SHARED.format(optimizer=OPTIMIZER, steps=STEPS).replace("% 2 == 1", "> 0"),
    )
    model, rows = surgery.apply(surgery.parse(text), architecture.model()), batches(architecture)
    seen: list[tuple[int, bool]] = []
    before = states_of(model)

    class Watch(surgery.TrainerCallback):
        def on_optimizer_step(self, *arguments: Any, **named: Any) -> None:
            super().on_optimizer_step(*arguments, **named)
            own = states_of(model)
            same = all(torch.equal(own[key], before[key]) for key in own if "clock" not in key)
            seen.append((int(own["surgery_clock.steps_taken"]), same))

    training = trainer(model, rows, tmp_path, callbacks=[Watch(model)], kind=Overflowing, optim=optimizer)
    training.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    training.train()
    assert seen == [(0, True), (0, True), (1, False), (2, False), (3, False), (4, False)]
    counts = [float(value) for key, value in model.state_dict().items() if key.endswith("count")]
    assert counts == [3.0] * 4
    assert training.state.global_step == STEPS


def code_of(error: pytest.ExceptionInfo[surgery.SurgError]) -> str:
    (found,) = error.value.diagnostics
    return found.code


@pytest.fixture
def events(architectures: Any) -> Iterator[Any]:
    """A Llama with a program that has events."""
    yield adapted(architectures["llama"], METHODS["literal"], torch.float32)


def test_without_the_callback_the_first_step_is_an_error(events: Any, architectures: Any, tmp_path: Path) -> None:
    before = states_of(events)
    with pytest.raises(surgery.SurgError, match="nobody drives the step's clock") as raised:
        trainer(events, batches(architectures["llama"]), tmp_path, callbacks=[]).train()
    assert code_of(raised) == "SURG060"
    assert "TrainerCallback(model)" in str(raised.value)
    assert all(torch.equal(value, before[key]) for key, value in events.state_dict().items())


@pytest.mark.parametrize("way", ["itself", "copied", "pickled", "below the root", "in training"])
def test_own_loops_are_refused_too(way: str, events: Any, architectures: Any) -> None:
    batch = batches(architectures["llama"])[0]
    if way == "copied":
        events(**batch)  # now the parameters of the original are watched
        events = copy.deepcopy(events)
    if way == "pickled":
        events(**batch)
        file = io.BytesIO()
        torch.save(events, file)
        file.seek(0)
        events = torch.load(file, weights_only=False)
    if way == "in training":
        events.train()
    if way == "below the root":
        loss = events.model(batch["input_ids"]).last_hidden_state.square().sum()
    else:
        loss = events(**batch).loss
    with pytest.raises(surgery.SurgError, match="nobody drives the step's clock"):
        loss.backward()


def test_a_copied_model_trains_as_the_original(events: Any, architectures: Any, tmp_path: Path) -> None:
    rows, other = batches(architectures["llama"]), copy.deepcopy(events)
    first, second = trainer(events, rows, tmp_path), trainer(other, rows, tmp_path, callbacks=[surgery.TrainerCallback])
    first.train()
    second.train()
    assert first.losses == second.losses
    assert first.losses[0] != first.losses[-1]


def test_a_second_training_goes_on_counting(events: Any, architectures: Any, tmp_path: Path) -> None:
    """The event's sum begins once in a model's life, not once per call of `train`."""
    rows = batches(architectures["llama"])
    for number in (1, 2):
        trainer(events, rows, tmp_path).train()
        assert int(events.surgery_clock.steps_taken) == number * STEPS
    with pytest.raises(surgery.SurgError, match="nobody drives"):
        events(**rows[0]).loss.backward()


def test_another_model_is_refused(events: Any, architectures: Any, tmp_path: Path) -> None:
    rows, plain = batches(architectures["llama"]), architectures["llama"].model()
    with pytest.raises(surgery.SurgError, match="not adapted"):
        surgery.TrainerCallback(plain)
    with pytest.raises(surgery.SurgError, match="not adapted"):
        trainer(plain, rows, tmp_path, callbacks=[surgery.TrainerCallback()]).train()
    with pytest.raises(surgery.SurgError, match="another model"):
        trainer(copy.deepcopy(events), rows, tmp_path, callbacks=[surgery.TrainerCallback(events)]).train()


def test_a_checkpoint_without_the_clock_is_refused(events: Any, architectures: Any, tmp_path: Path) -> None:
    rows = batches(architectures["llama"])
    other = adapted(architectures["llama"], METHODS["lora"], torch.float32)
    trainer(other, rows, tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(surgery.SurgError, match="after step 2") as raised:
        trainer(events, rows, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert code_of(raised) == "SURG054"


def test_a_run_that_is_attached_is_not_trained_on(architectures: Any, tmp_path: Path) -> None:
    architecture = architectures["llama"]
    rows = batches(architecture)
    step, _ = compiled(architecture, METHODS["literal"], rows, torch.float32)
    step.save(tmp_path / "run")
    model: Any = surgery.apply(tmp_path / "run", architecture.model())
    assert model.generate(rows[0]["input_ids"], max_new_tokens=2, do_sample=False).shape[1] > 9
    with pytest.raises(surgery.SurgError, match="surgery train --resume"):
        model(**rows[0]).loss.backward()
