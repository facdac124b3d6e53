"""`compile = reduce_overhead` on a CUDA device: the numbers of the step as it is, and no wait of the host in it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import surgery
import surgery.runtime.step
from surgery.runtime.replay import Replay

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [16, 24, 16, 24, 16, 24, 16, 16, 24, 9]
LORA = "lora(rank = 4, alpha = 8)"


def encoder(drop: float) -> nn.Module:
    config = AutoConfig.for_model(
        "bert", hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, vocab_size=96,
        num_labels=3, hidden_dropout_prob=drop, attention_probs_dropout_prob=drop,
    )  # fmt: skip
    model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model


def decoder(drop: float) -> nn.Module:
    config = AutoConfig.for_model(
        "llama", hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
        intermediate_size=96, attention_dropout=drop,
    )  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


class Normed(nn.Module):
    """Convolutions with batch norm, whose running statistics the forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, 3, height, width]` to `[batch, 8]`."""
        hidden = torch.relu(self.norm(self.convolution(x))).mean((2, 3))
        found: Tensor = self.down(torch.relu(self.up(hidden)))
        return found


@cache
def model_of(kind: str, drop: float) -> nn.Module:
    """Made once: what two steps are compared by is not how torch's generator stood when each was built."""
    torch.manual_seed(0)
    return Normed() if kind == "normed" else {"encoder": encoder, "decoder": decoder}[kind](drop)


def batch(kind: str, length: int, number: int, rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * length + number)
    if kind == "normed":
        found = {"x": torch.randn(rows, 3, length, length, generator=generator)}
    else:
        found = {"input_ids": torch.randint(3, 96, (rows, length), generator=generator)}
    if kind == "decoder":
        found["labels"] = found["input_ids"].clone()
    else:
        found["labels"] = torch.randint(0, 3, (rows,), generator=generator)
    if kind == "encoder":
        found["attention_mask"] = (torch.arange(length) < torch.tensor([[length], [length - 2], [5], [length]])).long()
    return {name: tensor.cuda() for name, tensor in found.items()}


def step_of(kind: str, compiled: str, method: str = LORA, drop: float = 0.1, more: str = "") -> Any:
    model = copy.deepcopy(model_of(kind, drop)).cuda()
    sites, loss = {
        "encoder": ("bert.encoder.layer.*.attention.self.{query,value}", "cross_entropy"),
        "decoder": ("model.layers.*.{self_attn,mlp}.*_proj", "causal_lm"),
        "normed": ("{up,down}", "cross_entropy"),
    }[kind]
    program = surgery.parse(f"""
        adapt {sites} {{ with {method} }}
        step {{ optimizer = adamw(lr = 1e-2)  batch = 4  steps = 20  loss = {loss}  compile = {compiled} {more} }}
    """)
    example = {name: tensor for name, tensor in batch(kind, 16, 0).items() if name != "labels"}
    return surgery.compile(program, model=model, example_inputs=example, device="cuda")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Nothing compiled before, and reductions in the same order in two compilations of one step.

    Inductor times several forms of a reduction on the device and keeps the quickest, on disk too: what another process
    writes there in between would give the second step other kernels than the first has.
    """
    torch._dynamo.reset()
    with torch._inductor.config.patch(deterministic=True):
        yield
    torch.cuda.set_sync_debug_mode("default")


def losses(step: Any, kind: str, lengths: list[int] = LENGTHS) -> list[float]:
    """From one seed; read at the end, as nothing may depend on waiting in between."""
    torch.manual_seed(3)
    found = [step(batch(kind, length, number)).loss for number, length in enumerate(lengths)]
    return [float(loss) for loss in found]


def run_from(start: Any, step: Any, kind: str, lengths: list[int] = LENGTHS) -> list[Any]:
    """Losses and then weights of a run from a state.

    Runs of one step are compared: what it compiles to is the same kernels then, which two steps need not have.
    """
    step.load_state_dict(copy.deepcopy(start))
    return [*losses(step, kind, lengths), *(tensor.clone() for tensor in step.weights.values())]


def assert_equal(ours: list[Any], theirs: list[Any]) -> None:
    """To the bit."""
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("way", ["off", "on"])
@pytest.mark.parametrize(
    ("kind", "method", "more"),
    [
        ("encoder", LORA, ""),
        ("encoder", LORA, "micro_batch = 2  clip = 0.5"),
        ("encoder", LORA, "precision = bfloat16"),
        ("encoder", LORA, "precision = float16"),
        ("decoder", "dora(rank = 4)", ""),
        ("decoder", "delta_lora(rank = 4, alpha = 8, ratio = 0.5, start = 1)", "clip = 1.0"),
        ("normed", LORA, ""),
    ],
)
def test_losses_and_weights_are_the_same_to_the_bit(way: str, kind: str, method: str, more: str) -> None:
    step = step_of(kind, way, method, more=more)
    start, plain = copy.deepcopy(step.state_dict()), step._namespace["gradients"]
    # The replay first: what has run on the present stream before cannot always be recorded on another.
    step._namespace["gradients"] = replay = Replay(plain, step.device)
    found = run_from(start, step, kind)
    step._namespace["gradients"] = plain
    assert_equal(found, run_from(start, step, kind))
    assert len(replay.recorded) == 2 and not replay.refused


def test_the_setting_replays() -> None:
    step = step_of("encoder", "reduce_overhead")
    replay = step._namespace["gradients"]
    assert isinstance(replay, Replay)
    start = copy.deepcopy(step.state_dict())
    found = run_from(start, step, "encoder")
    step._namespace["gradients"] = replay.gradients
    assert_equal(found, run_from(start, step, "encoder"))
    assert len(replay.recorded) == 2


def test_each_step_block_records_its_own_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of("encoder", "reduce_overhead", more="} step { freeze **.A  steps = 5 } step { steps = 5")
    step.lengths = (4, 5, 5)
    start = copy.deepcopy(step.state_dict())
    found = run_from(start, step, "encoder", [16] * 14)
    assert step.block == 2 and len(step._namespace["gradients"].recorded) == 1
    monkeypatch.setattr(surgery.runtime.step, "replayed", lambda gradients, device: gradients)
    plain = run_from(start, step, "encoder", [16] * 14)
    assert step.block == 2 and not isinstance(step._namespace["gradients"], Replay)
    assert_equal(found, plain)


def test_a_resumed_run_goes_on_to_the_bit() -> None:
    step = step_of("encoder", "reduce_overhead")
    losses(step, "encoder")
    state = copy.deepcopy(step.state_dict())
    later = [float(step(batch("encoder", 16, number)).loss) for number in range(4)]
    step.load_state_dict(copy.deepcopy(state))  # an optimizer goes on with the tensors that it is given
    assert [float(step(batch("encoder", 16, number)).loss) for number in range(4)] == later
    # Another step records anew, and may compile to other kernels.
    again = step_of("encoder", "reduce_overhead")
    again.load_state_dict(state)
    assert [float(again(batch("encoder", 16, number)).loss) for number in range(4)] == pytest.approx(later, rel=1e-5)


@pytest.mark.parametrize("way", ["off", "on", "reduce_overhead"])
@pytest.mark.parametrize("more", ["", "micro_batch = 2  clip = 0.5", "precision = bfloat16"])
def test_the_host_waits_for_nothing_in_a_step(way: str, more: str) -> None:
    step = step_of("encoder", way, more=more)
    losses(step, "encoder", [16] * 4)
    on_cpu = [{name: tensor.cpu() for name, tensor in batch("encoder", 16, number).items()} for number in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    found = [step(part).loss for part in on_cpu]
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(loss) for loss in found)


def test_events_and_a_causal_loss_wait_for_nothing_either() -> None:
    step = step_of("decoder", "on", "delta_lora(rank = 4, alpha = 8, ratio = 0.5, start = 1)")
    losses(step, "decoder", [16] * 4)
    part = batch("decoder", 16, 9)
    torch.cuda.set_sync_debug_mode("error")
    loss = step(part).loss
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@pytest.mark.parametrize("failure", ["wait", "refusal"])
def test_a_step_that_cannot_be_recorded_says_so_and_goes_on_with_its_dropout(failure: str) -> None:
    step, plain = step_of("encoder", "off"), step_of("encoder", "off")
    gradients = step._namespace["gradients"]

    def failing(weights: Any, part: dict[str, Tensor]) -> Tensor:
        loss: Tensor = gradients(weights, part)
        if failure == "wait":
            loss.item()
        elif torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return loss

    step._namespace["gradients"] = Replay(failing, step.device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = losses(step, "encoder")
    assert sum("SURG058" in str(warning.message) for warning in said) == 1
    assert found == losses(plain, "encoder")
