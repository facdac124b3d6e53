"""The training step: its update, its clock, what it owns, what it refuses, and that it resumes to the bit."""

from __future__ import annotations

import copy
import traceback
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import surgery
from surgery.compiler import p5_capture
from surgery.compiler.diagnostics import SurgError
from surgery.compiler.event_program import EventProgram
from surgery.compiler.pipeline import adapt
from surgery.runtime.initialise import initialise
from surgery.runtime.step import TrainingStep

Batch = dict[str, Tensor]


class Network(nn.Module):
    """Two layers with dropout between them, and running statistics."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.dropout(torch.relu(self.norm(self.first(x)))))
        return y


def network(dropout: float = 0.0) -> Network:
    torch.manual_seed(0)
    return Network(dropout)


def spec(step: str, train: str = "train last") -> str:
    return (
        f"adapt first {{ with lora(rank = 2, alpha = 4) }}\n{train}\nstep {{ loss = cross_entropy  batch = 6  {step} }}"
    )


def compile_step(step: str, model: nn.Module | None = None, train: str = "train last", **options: Any) -> TrainingStep:
    model = network() if model is None else model
    return surgery.compile(
        surgery.parse(spec(step, train)), model=model, example_inputs={"x": torch.randn(4, 5)}, **options
    )


def batch(seed: int = 0, rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator)
    return {"x": x, "labels": torch.randint(3, (rows,), generator=generator)}


def code_of(run: Any) -> str:
    with pytest.raises(SurgError) as caught:
        run()
    (diagnostic,) = caught.value.diagnostics
    return diagnostic.code


# --- the update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "make"),
    [
        ("adamw(lr = 0.02, weight_decay = 0.1)", lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1)),
        ("adamw(lr = 0.02, betas = [0.8, 0.9], eps = 1e-6)",
         lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)),
        ("sgd(lr = 0.1, momentum = 0.9)", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ],
)  # fmt: skip
def test_the_update_is_that_of_a_loop_by_hand(text: str, make: Any) -> None:
    """Whole parameters only, so that the reference is the model itself: loss, clip, schedule, optimizer."""
    torch.manual_seed(0)
    model = Network().double()
    names = ["first.weight", "first.bias", "last.weight", "last.bias"]
    program = surgery.parse(
        f"train first\ntrain last\nstep {{ loss = cross_entropy  batch = 6  steps = 8  clip = 0.3  optimizer = {text}"
        + "  schedule = linear(warmup = 0.25) }"
    )
    step = surgery.compile(program, model=model, example_inputs={"x": torch.randn(4, 5).double()})
    mirror = copy.deepcopy(model).train()
    mirror.requires_grad_(False)
    learned = [mirror.get_parameter(name).requires_grad_() for name in names]
    optimizer = make(learned)
    base = optimizer.param_groups[0]["lr"]
    for number in range(6):
        data = batch(number)
        data["x"] = data["x"].double()
        factor = number / 2 if number < 2 else (8 - number) / 6
        assert step.learning_rate == pytest.approx(base * factor)
        optimizer.param_groups[0]["lr"] = base * factor
        loss = F.cross_entropy(mirror(data["x"]), data["labels"])
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(learned, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        result = step(data)
        assert result.taken and float(result.penalty) == 0
        assert result.loss.shape == () and not result.loss.requires_grad
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(result.gradient_norm, norm, rtol=1e-10, atol=0)
        for name, parameter in zip(names, learned, strict=True):
            torch.testing.assert_close(step.weights[name], parameter, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(step.weights["norm.running_mean"], mirror.get_buffer("norm.running_mean"))
    assert step.step == 6


def test_micro_batches_equal_the_whole_batch(architectures: Any) -> None:
    """Label counts differ by row; the last micro-batch is shorter."""
    llama = architectures["llama"]
    inputs = llama.inputs(5, 8)
    labels = inputs["input_ids"].clone()
    for row in range(5):
        labels[row, : 2 * row - 1] = -100
    steps = []
    for size in (5, 1, 2, 4):
        text = (
            'model "given" { task = causal_lm }\nadapt model.layers.*.self_attn.q_proj { with lora(rank = 2) }\n'
            f"step {{ optimizer = sgd(lr = 0.5)  batch = 5  micro_batch = {size}  steps = 3  clip = 0.7 }}"
        )
        step = surgery.compile(surgery.parse(text), model=llama.model().double(), example_inputs=inputs)
        steps.append((step, [step({**inputs, "labels": labels}).loss for _ in range(3)]))
    (whole, expected), *parts = steps
    for split, found in parts:
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-12, atol=1e-12)
        for key, tensor in whole.state_dict()["weights"].items():
            torch.testing.assert_close(split.weights[key], tensor, rtol=1e-10, atol=1e-12)
    loss, count = whole.evaluate_loss({**inputs, "labels": labels})
    assert int(count) == int((labels[:, 1:] != -100).sum()) == int(whole.label_count({**inputs, "labels": labels}))
    assert loss.dtype == torch.float64


def test_tensors_have_their_own_rates() -> None:
    step = compile_step("optimizer = sgd(lr = 0.1)  steps = 2", train="train last { lr = 1e-30 }")
    before = step.weights["last.weight"].detach().clone()
    step(batch())
    assert torch.equal(step.weights["last.weight"], before)
    assert float(step.weights["first.B"].detach().abs().max()) > 0


def test_float16_skips_a_step_whose_gradients_overflow() -> None:
    step = compile_step("optimizer = sgd(lr = 0.1)  steps = 9  precision = float16")
    weights = {key: tensor.clone() for key, tensor in step.state_dict()["weights"].items() if "running" not in key}
    scaler: Any = step._scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60})
    result = step(batch())
    assert not result.taken and step.step == 0 and torch.isfinite(result.loss)
    assert scaler.get_scale() == 2.0**59
    assert all(torch.equal(step.weights[key], tensor) for key, tensor in weights.items() if "num_b" not in key)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**10})
    assert step(batch()).taken and step.step == 1


def test_bfloat16_runs_the_forward_under_autocast() -> None:
    exact, rounded = (
        compile_step(f"optimizer = sgd(lr = 0.1)  steps = 9 {text}") for text in ("", "precision = bfloat16")
    )
    losses = [float(step(batch()).loss) for step in (exact, rounded)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    step = compile_step("optimizer = adamw(lr = 0.1)  steps = 9")
    step(batch())
    before = copy.deepcopy(step.state_dict())
    data = batch()
    data["x"][0, 0] = float("nan")
    result = step(data)
    assert not result.taken and torch.isnan(result.loss) and step.step == 1
    state = step.state_dict()
    assert {"norm.running_mean", "norm.num_batches_tracked"} < before["weights"].keys()
    assert all(torch.equal(state["weights"][key], before["weights"][key]) for key in before["weights"])
    assert step(batch()).taken


# --- what it owns -----------------------------------------------------------------------------------------------------


def test_the_users_model_is_never_changed() -> None:
    torch.manual_seed(0)
    model = Network(0.1).eval()
    model.last.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    step = compile_step("optimizer = sgd(lr = 0.5)  steps = 9", model)
    for number in range(3):
        step(batch(number))
    for (name, ours), theirs in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert not torch.equal(step.weights["last.weight"], model.last.weight)
    assert step.weights["first.weight"].data_ptr() == model.first.weight.data_ptr()  # frozen: shared
    assert not step.weights["first.weight"].requires_grad and step.weights["first.A"].requires_grad
    assert step.module.get_parameter("last.weight") is step.weights["last.weight"]
    assert step.parameters_by_site["first"]["A"] is step.weights["first.A"]


def test_ties_survive(architectures: Any) -> None:
    qwen = architectures["qwen2"]
    model = qwen.model(tie_word_embeddings=True)
    text = (
        'model "given" { task = causal_lm }\nadapt model.layers.*.self_attn.q_proj { with lora(rank = 2) }\n'
        "train model.norm\nstep { optimizer = sgd(lr = 0.5)  batch = 4  steps = 2 }"
    )
    step = surgery.compile(surgery.parse(text), model=model, example_inputs=qwen.inputs())
    assert step.weights["lm_head.weight"] is step.weights["model.embed_tokens.weight"]
    step({**qwen.inputs(), "labels": qwen.labels()})
    assert step.weights["model.norm.weight"] is not model.model.norm.weight


@pytest.mark.parametrize("optimizer", ["adamw(lr = 0.01)", "sgd(lr = 0.1, momentum = 0.9)"])
def test_a_resumed_run_goes_on_to_the_bit(optimizer: str) -> None:
    text = f"optimizer = {optimizer}  steps = 9  schedule = cosine(warmup = 2)  micro_batch = 4"
    whole = compile_step(text, network(0.3))
    expected = [whole(batch(number)).loss for number in range(6)]
    first = compile_step(text, network(0.3))
    found = [first(batch(number)).loss for number in range(3)]
    state = copy.deepcopy(first.state_dict())
    second = compile_step(text, network(0.3))
    torch.rand(17)  # whatever else has drawn random numbers meanwhile
    second.load_state_dict(state)
    found += [second(batch(number)).loss for number in range(3, 6)]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    for key, tensor in whole.state_dict()["weights"].items():
        assert torch.equal(second.weights[key], tensor), key


def test_a_state_of_another_program_is_refused() -> None:
    step = compile_step("optimizer = sgd(lr = 0.1)  steps = 9")
    state = step.state_dict()
    del state["weights"]["first.A"]
    assert code_of(lambda: step.load_state_dict(state)) == "SURG054"


def test_evaluation_has_no_dropout_and_no_gradient() -> None:
    model = Network(0.5).eval()
    step = compile_step("optimizer = sgd(lr = 0.1)  steps = 9", model)
    data = batch()
    with torch.no_grad():
        expected = model(data["x"])
    output = step.forward(x=data["x"])
    assert torch.equal(output, expected) and not output.requires_grad
    loss, count = step.evaluate_loss(data)
    torch.testing.assert_close(loss / count, F.cross_entropy(expected, data["labels"]))


def test_outputs_by_name(architectures: Any) -> None:
    bert = architectures["bert"]
    text = (
        'model "given" { task = sequence_classification(labels = 3) }\n'
        "adapt bert.encoder.layer.*.attention.self.query { with lora(rank = 2) }\n"
        "step { optimizer = sgd(lr = 0.1)  steps = 1 }"
    )
    step = surgery.compile(surgery.parse(text), model=bert.model(), example_inputs=bert.inputs())
    output = step.forward(**bert.inputs())
    assert output.logits is output["logits"] and not hasattr(output, "loss")


def test_errors_show_the_lines_of_the_emitted_source() -> None:
    step = compile_step("optimizer = sgd(lr = 0.1)  steps = 9")
    try:
        step.forward(x=torch.randn(2, 4))
    except RuntimeError as error:
        assert "F.linear(" in "".join(traceback.format_exception(error))
    else:
        raise AssertionError("a matrix that does not fit was multiplied")


def test_an_edited_source_is_what_runs() -> None:
    step = compile_step("optimizer = sgd(lr = 0.1)  steps = 9")
    step.use_source(step.source.replace("loss = loss + share.detach()", "loss = loss + 2 * share.detach()"))
    other = compile_step("optimizer = sgd(lr = 0.1)  steps = 9")
    assert torch.equal(step(batch()).loss, 2 * other(batch()).loss)
    assert torch.equal(step.weights["first.B"], other.weights["first.B"])


# --- the clock --------------------------------------------------------------------------------------------------------


def recorded(body: Any, *names: str) -> fx.Graph:
    """A graph with placeholders of these names and the in-place operations of `body` on them."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    body(*(fx.Proxy(graph.placeholder(name), tracer) for name in names))
    graph.output(None)
    return graph


def test_events_run_at_their_point_of_the_clock() -> None:
    torch.manual_seed(0)
    model = Network().double()
    program = surgery.parse(spec("optimizer = sgd(lr = 0.1)  steps = 9"))
    plan = surgery.plan(program, model)
    graph = p5_capture.run(model, {"x": torch.randn(4, 5).double()}, None)
    graph = adapt(plan, graph, initialise(plan, dict(model.named_parameters())))
    site = {"W": "first.weight", "A": "first.A", "B": "first.B"}
    events = (
        EventProgram(
            "spec.surg:1: at the start", "start", "step == 1", "restart",
            recorded(lambda A: A.mul_(2.0), "A"), ({"A": site["A"]},),
        ),
        EventProgram(
            "spec.surg:2: after step", "after step", "step >= 2", "move",
            recorded(lambda W, B, B_before, A: W.addmm_(B - B_before, A), "W", "B", "B_before", "A"),
            (site | {"B_before": "first.B.before"},),
        ),
    )  # fmt: skip
    step = TrainingStep(plan, graph, model, events=events)
    quiet = TrainingStep(plan, graph, model, events=())
    assert (
        'keep(weights, [f"{site}.B" for site in SITES])' in step.source and "# spec.surg:2: after step" in step.source
    )
    weight, start = model.first.weight.detach().clone(), step.weights["first.A"].detach().clone()

    def data(number: int) -> Batch:
        return {name: value.double() if name == "x" else value for name, value in batch(number).items()}

    assert torch.equal(step(data(0)).loss, quiet(data(0)).loss)
    assert torch.equal(step.weights["first.A"], quiet.weights["first.A"])
    with torch.no_grad():
        quiet.weights["first.A"].mul_(2.0)  # step 1, before its forward
    assert torch.equal(step(data(1)).loss, quiet(data(1)).loss)
    assert torch.equal(step.weights["first.weight"], weight)
    before = step.weights["first.B"].detach().clone()
    assert torch.equal(step(data(2)).loss, quiet(data(2)).loss)
    moved = weight + (step.weights["first.B"] - before) @ step.weights["first.A"]
    torch.testing.assert_close(step.weights["first.weight"], moved.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(model.first.weight, weight) and not torch.equal(start, step.weights["first.A"])
    assert "first.weight" in step.state_dict()["weights"]


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def causal() -> TrainingStep:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0))
    text = (
        'model "given" { task = causal_lm }\nadapt model.layers.*.self_attn.q_proj { with lora(rank = 2) }\n'
        "step { optimizer = sgd(lr = 1e-9)  batch = 3  steps = 5 }"
    )
    tokens = torch.randint(1, 50, (2, 6))
    return surgery.compile(surgery.parse(text), model=model, example_inputs={"input_ids": tokens})


def test_padding_on_the_right_is_exact(causal: TrainingStep) -> None:
    tokens = torch.randint(1, 50, (1, 4), generator=torch.Generator().manual_seed(2))
    padded = F.pad(tokens, (0, 3))
    mask = (padded != 0).long()
    alone, count = causal.evaluate_loss({"input_ids": tokens, "labels": tokens})
    with_padding, same = causal.evaluate_loss({"input_ids": padded, "attention_mask": mask, "labels": padded})
    assert int(count) == int(same) == 3
    torch.testing.assert_close(alone, with_padding)
    logits = causal.forward(input_ids=padded, attention_mask=mask).logits[:, :4]
    torch.testing.assert_close(logits, causal.forward(input_ids=tokens).logits)
    assert int(padded[0, -1]) == 0  # the caller's labels are not changed


def test_batches_that_do_not_fit(causal: TrainingStep) -> None:
    tokens = torch.randint(1, 50, (3, 6))
    good = {"input_ids": tokens, "labels": tokens}
    left = torch.ones_like(tokens)
    left[1, :2] = 0
    hole = torch.ones_like(tokens)
    hole[2, 3] = 0
    assert code_of(lambda: causal({**good, "attention_mask": left})) == "SURG043"
    assert code_of(lambda: causal({**good, "attention_mask": hole})) == "SURG043"
    assert code_of(lambda: causal.forward(input_ids=tokens, attention_mask=left)) == "SURG043"
    assert code_of(lambda: causal({"input_ids": tokens})) == "SURG044"
    assert code_of(lambda: causal({"labels": tokens})) == "SURG044"
    assert code_of(lambda: causal({**good, "input_id": tokens})) == "SURG044"
    assert code_of(lambda: causal({**good, "labels": tokens[:2]})) == "SURG044"
    assert code_of(lambda: causal({**good, "attention_mask": left[:, :3]})) == "SURG044"
    assert code_of(lambda: causal({"input_ids": tokens[:0], "labels": tokens[:0]})) == "SURG044"
    no_tensor: Any = tokens.tolist()
    assert code_of(lambda: causal({**good, "labels": no_tensor})) == "SURG044"
    assert causal.step == 0


def test_a_schedule_needs_the_number_of_steps() -> None:
    step = compile_step("optimizer = sgd(lr = 0.1)  epochs = 2  schedule = cosine()")
    assert code_of(lambda: step(batch())) == "SURG044"
    step.steps = 4
    assert step(batch()).taken


def test_unknown_sites(causal: TrainingStep) -> None:
    assert code_of(lambda: causal.effective_weight("model.layers.0.self_attn.q_prj")) == "SURG020"
    assert causal.effective_bias("model.layers.0.self_attn.q_proj") is None
    weight = causal.effective_weight("model.layers.0.self_attn.q_proj")
    assert weight.shape == (16, 16) and weight.dtype == torch.float32


def test_micro_batches_end_at_their_last_real_token() -> None:
    spec = """
        adapt bert.encoder.layer.** : Linear {{ with lora(rank = 2) }}
        model "unused" {{ task = sequence_classification(labels = 3) }}
        step {{ optimizer = sgd(lr = 0.1)  batch = 4  {micro}  steps = 3 }}
    """
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
        max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 3
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).double()
    ids = torch.randint(1, 40, (4, 9))
    mask = torch.arange(9) < torch.tensor([[3], [4], [7], [9]])
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor([0, 1, 2, 1])}
    found = []
    for micro in ("", "micro_batch = 2"):
        step = surgery.compile(surgery.parse(spec.format(micro=micro)), model=model)
        assert ("without_padding" in step.source) == bool(micro)
        found.append(torch.stack([step(batch).loss for _ in range(3)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


class Repeated(nn.Module):
    """One layer under two names, each of which is called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second, self.last = self.first, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.second(torch.tanh(self.first(x))))
        return y


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_layer_with_two_names_is_adapted_at_every_use(name: str) -> None:
    torch.manual_seed(0)
    text = spec("optimizer = sgd(lr = 0.5)  steps = 4", "").replace("adapt first", f"adapt {name}")
    step = surgery.compile(surgery.parse(text), model=Repeated(), example_inputs={"x": torch.randn(4, 5)})
    for number in range(4):
        step(batch(number))
    x = batch()["x"]
    torch.testing.assert_close(step.merge()(x), step.forward(x=x))


@pytest.mark.parametrize("delta", ["(B @ A) ** 2", "-((B @ A) ** 2)", "(-(B @ A)) ** 2", "((B @ A) ** 2) ** 3"])
def test_powers_are_written_as_they_bind(delta: str) -> None:
    start = "normal(1.0)"
    text = f"method m() {{ A = train {start}[2, in];  B = train {start}[out, 2];  delta = {delta} }}\n"
    text += spec("steps = 4", "").replace("lora(rank = 2, alpha = 4)", "m()")
    step = surgery.compile(surgery.parse(text), model=network(), example_inputs={"x": torch.randn(4, 5)})
    x = batch()["x"]
    torch.testing.assert_close(step.forward(x=x), step.merge().eval()(x))


def test_what_is_no_state_and_no_device_is_refused() -> None:
    text = "adapt * { with lora(rank = 1) }\nstep { optimizer = sgd(lr = 0.1)  loss = mse }"
    inputs = {"input": torch.randn(3, 4)}
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    step = surgery.compile(surgery.parse(text), model, inputs)
    assert code_of(lambda: step.load_state_dict({})) == "SURG054"
    assert code_of(lambda: surgery.compile(surgery.parse(text), model, inputs, "gpu")) == "SURG004"
