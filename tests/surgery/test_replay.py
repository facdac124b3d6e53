"""Replaying a step's gradients: which batches are recorded, and that the numbers stay; over graphs that are played.

The graphs of `played` run the recorded function again over the recorded tensors, and write where a CUDA graph writes.
tests/gpu/test_replay_on_gpu.py has the real ones.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.runtime.replay import Replay


class Played:
    """Stands for CUDA while tests run without one."""

    def __init__(self, gradients: Any) -> None:
        self.gradients, self.recording, self.replays, self.runs = gradients, None, 0, 0
        self.error = ""

    def __call__(self, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """`gradients` itself, or its recording, whose results are garbage until a replay."""
        if self.recording is None:
            self.runs += 1
            found: Tensor = self.gradients(weights, batch)
            return found
        if self.error:
            raise RuntimeError(self.error)
        loss: Tensor = self.gradients(weights, batch)
        results = {name: tensor.grad for name, tensor in weights.items() if tensor.grad is not None}
        for result in (loss, *results.values()):
            result.fill_(float("nan"))
        self.recording.again = lambda: self._again(weights, batch, loss, results)
        return loss

    def _again(self, weights: dict[str, Tensor], batch: dict[str, Tensor], loss: Tensor, results: Any) -> None:
        self.replays += 1
        present = {name: weights[name].grad for name in results}
        for name in results:
            weights[name].grad = None
        loss.copy_(self.gradients(weights, batch))
        for name, result in results.items():
            result.copy_(weights[name].grad)
            weights[name].grad = present[name]

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any) -> Iterator[None]:
        """For torch.cuda.graph."""
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a step replay, and gives what it is played by: `played(step)`."""

    def put(step: Any, most: int = 32) -> Played:
        player = Played(step._namespace["gradients"])
        generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)
        stream = SimpleNamespace(wait_stream=lambda other: None, device=torch.device("cuda", 0))
        cuda = {
            "Stream": lambda device: stream, "current_stream": lambda device: stream, "graph": player.graph,
            "stream": lambda stream: contextlib.nullcontext(), "graph_pool_handle": lambda: 0,
            "CUDAGraph": Graph, "default_generators": [generator],
            "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda mode: None,
        }  # fmt: skip
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        step._namespace["gradients"] = Replay(player, torch.device("cuda", 0), most)
        return player

    return put


class Graph:
    """For torch.cuda.CUDAGraph."""

    again: Any = None

    def replay(self) -> None:
        """What was recorded, once more."""
        self.again()


class Model(nn.Module):
    """Two layers over any length."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(5, 7), nn.Linear(7, 2), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, length, 5]` to `[batch, 2]`."""
        found: Tensor = self.down(self.drop(torch.tanh(self.up(x)))).mean(1)
        return found


def step_of(drop: float = 0.0, more: str = "") -> Any:
    torch.manual_seed(0)
    program = surgery.parse(f"""
        adapt {{up,down}} {{ with lora(rank = 2, alpha = 4) }}
        step {{ optimizer = adamw(lr = 1e-2)  batch = 4  steps = 20  loss = mse  compile = off {more} }}
    """)
    return surgery.compile(program, model=Model(drop), example_inputs={"x": torch.randn(4, 3, 5)})


def batch(length: int, number: int = 0, rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * length + number)
    return {"x": torch.randn(rows, length, 5, generator=generator), "labels": torch.randn(rows, 2, generator=generator)}


def losses(step: Any, lengths: list[int]) -> list[float]:
    return [float(step(batch(length, number)).loss) for number, length in enumerate(lengths)]


@pytest.mark.parametrize("more", ["", "micro_batch = 3", "clip = 0.1"])
def test_losses_and_weights_are_the_same_to_the_bit(played: Any, more: str) -> None:
    lengths = [3, 4, 3, 4, 3, 4, 4, 3, 5, 3]
    plain, other = step_of(more=more), step_of(more=more)
    player = played(other)
    assert losses(other, lengths) == losses(plain, lengths)
    assert all(torch.equal(tensor, other.weights[name]) for name, tensor in plain.weights.items())
    # 3 and 4: first as they are; then 3 is watched, and 4 recorded at its second, 3 at its third; 5 comes once.
    assert (player.runs, player.replays) == (4, 6)
    assert not other._namespace["gradients"].refused


def test_each_step_block_records_its_own_gradients(played: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recording made in one block would give to tensors that rest in the next."""
    players = []

    def replay(gradients: Any, _: torch.device) -> Any:
        made = SimpleNamespace(_namespace={"gradients": gradients})
        players.append(played(made))
        return made._namespace["gradients"]

    monkeypatch.setattr("surgery.runtime.step.replayed", replay)
    plain, other = (step_of(more="} step { freeze **.A  steps = 5 } step { steps = 5") for _ in range(2))
    setting = other.plan.step.model_copy(update={"compile": "reduce_overhead"})
    other.plan = other.plan.model_copy(update={"step": setting})
    other._begin(0)
    plain.lengths = other.lengths = (4, 5, 5)
    assert losses(other, [3] * 14) == losses(plain, [3] * 14)
    assert all(torch.equal(tensor, other.weights[name]) for name, tensor in plain.weights.items())
    assert [(player.runs, player.replays) for player in players] == [(2, 2), (2, 3), (2, 3)]


def test_at_most_so_many_are_kept_and_the_least_recently_used_goes(played: Any) -> None:
    step = step_of()
    player = played(step, most=2)
    losses(step, [3, 4, 5, 3, 4, 4, 3, 3, 4])
    kept = step._namespace["gradients"].recorded
    assert [key[0][1][1] for key in kept] == [3, 4]
    losses(step, [5])
    assert [key[0][1][1] for key in kept] == [4, 5]
    replays = player.replays
    assert losses(step, [3]) == losses(step_after([3, 4, 5, 3, 4, 4, 3, 3, 4], [5]), [3])
    assert player.replays == replays + 1  # recorded again


def step_after(*parts: list[int]) -> Any:
    step = step_of()
    for lengths in parts:
        losses(step, lengths)
    return step


def test_weights_that_lie_elsewhere_void_what_is_recorded(played: Any) -> None:
    plain, other = step_of(), step_of()
    player = played(other)
    assert losses(other, [3] * 4) == losses(plain, [3] * 4)
    assert player.replays == 2
    name = next(iter(other.weights))
    other.weights[name].data = other.weights[name].data.clone()
    again = [losses(step, [3] * 3) for step in (plain, other)]
    assert again[0] == again[1]
    assert (
        all(torch.equal(tensor, other.weights[name]) for name, tensor in plain.weights.items()) and player.replays == 5
    )


def test_gradients_that_are_there_already_are_added_to(played: Any) -> None:
    step = step_of()
    player = played(step)
    gradients = step._namespace["gradients"]
    losses(step, [3] * 3)
    gradients(step.weights, batch(3))
    once = {name: tensor.grad.clone() for name, tensor in step.weights.items() if tensor.grad is not None}
    runs = player.runs
    gradients(step.weights, batch(3))
    assert player.runs == runs + 1
    for name, gradient in once.items():
        torch.testing.assert_close(step.weights[name].grad, 2 * gradient)


def test_random_numbers_of_the_cpu_are_refused(played: Any) -> None:
    plain, other = step_of(drop=0.5), step_of(drop=0.5)
    found = []
    for step in (plain, other):
        if step is other:
            player = played(step)
        torch.manual_seed(4)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found.append(losses(step, [3] * 4))
    assert found[0] == found[1] and player.replays == 0
    assert [str(warning.message).partition(":")[0] for warning in said] == ["warning[SURG058]"]


def test_a_wait_of_the_host_is_refused_and_says_where(played: Any) -> None:
    step = step_of()
    player = played(step)
    gradients = player.gradients

    def waiting(*arguments: Any) -> Tensor:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        found: Tensor = gradients(*arguments)
        return found

    player.gradients = waiting
    with pytest.warns(UserWarning, match=r"SURG058.*waits for the device, in .*test_replay.py:\d+"):
        assert losses(step, [3] * 4) == losses(step_of(), [3] * 4)
    assert player.replays == 0


def test_other_warnings_are_handed_on(played: Any) -> None:
    step = step_of()
    player = played(step)
    gradients = player.gradients

    def warning(*arguments: Any) -> Tensor:
        if player.runs == 2:
            warnings.warn("something else", stacklevel=1)
        found: Tensor = gradients(*arguments)
        return found

    player.gradients = warning
    with pytest.warns(UserWarning, match="something else"):
        losses(step, [3] * 4)
    assert player.replays == 2


def test_what_cuda_refuses_runs_as_it_is(played: Any) -> None:
    step = step_of()
    player = played(step)
    player.error = "operation not permitted when stream is capturing\nand more"
    with pytest.warns(
        UserWarning, match="SURG058.*RuntimeError: operation not permitted when stream is capturing"
    ) as said:
        assert losses(step, [3] * 5) == losses(step_of(), [3] * 5)
    assert len(said) == 1 and player.replays == 0 and "and more" not in str(said[0].message)


def test_a_loss_that_is_not_finite_changes_nothing(played: Any) -> None:
    step = step_of()
    played(step)
    losses(step, [3] * 3)
    before = {name: tensor.clone() for name, tensor in step.weights.items()}
    bad = batch(3)
    bad["x"][0, 0, 0] = float("nan")
    assert not step(bad).taken
    assert all(torch.equal(tensor, step.weights[name]) for name, tensor in before.items())
    assert losses(step, [3]) == losses(step_after([3] * 3), [3])
