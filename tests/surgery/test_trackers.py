"""Trackers: what TensorBoard reads back, and a run that goes on when a tracker fails."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from surgery.compiler.diagnostics import SurgError
from surgery.compiler.plan import Place, ReportPlan
from surgery.runtime import trackers
from surgery.runtime.run_folder import load_state
from surgery.runtime.trackers import check_installed
from surgery.runtime.train import train
from tests.loop import FakeStep, data, losses


def step_of(folder: Path, name: str, **settings: Any) -> FakeStep:
    return FakeStep(folder, **{"evaluate": 3, "log": 2, "report": ReportPlan(name=name), **settings})  # type: ignore[arg-type]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]


def scalars(run: Path) -> dict[str, dict[int, float]]:
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    return {name: {event.step: event.value for event in read.Scalars(name)} for name in read.Tags()["scalars"]}


def test_tensorboard_shows_the_rows_that_are_logged(tmp_path: Path) -> None:
    train(step_of(tmp_path, "tensorboard"), data(), tmp_path / "run", progress=False)
    found, written = scalars(tmp_path / "run"), rows(tmp_path / "run")
    assert sorted(found["train/loss"]) == [1, 2, 3, 5, 6]
    for shown, name in (("train/loss", "loss"), ("train/lr", "lr"), ("eval/accuracy", "eval_accuracy")):
        for number, value in found[shown].items():
            assert value == pytest.approx(written[number][name], rel=1e-6)
    assert sorted(found["eval/loss"]) == [2, 5, 6]
    assert found["train/tokens_per_second"][1] == pytest.approx(written[1]["tokens"] / written[1]["seconds"], rel=1e-5)
    assert written[1]["tokens"] == 6  # three rows of two


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(step: FakeStep) -> None:
        if step.step == 5:
            raise Killed

    first = step_of(tmp_path, "tensorboard", save=2, log=1)
    first.hook = kill
    with pytest.raises(Killed):
        train(first, data(), tmp_path / "run", progress=False)
    second = step_of(tmp_path, "tensorboard", save=2, log=1)
    second.load_state_dict(load_state(tmp_path / "run").state)
    assert second.step == 4
    train(second, data(), tmp_path / "run", resume=True, progress=False)
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("train/loss")] == list(range(7))


class Broken:
    """Takes three rows."""

    def __init__(self, *_: Any) -> None:
        self.taken = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.taken += 1
        if self.taken > 3:
            raise ConnectionError("the server\nis gone")

    def close(self) -> None:
        raise AssertionError("it was given up")


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.KINDS, "tensorboard", Broken)
    with pytest.warns(UserWarning, match=r"SURG071.*ConnectionError: the server is gone") as said:
        outcome = train(step_of(tmp_path, "tensorboard", log=1), data(), tmp_path / "run", progress=False)
    assert outcome.done == 7 and len(losses(tmp_path / "run")) == 7 and len(said) == 1


def test_a_tracker_that_does_not_begin_is_an_error_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("not logged in")

    monkeypatch.setitem(trackers.KINDS, "tensorboard", refuse)
    (tmp_path / "demo.surg").write_text("step { report = tensorboard }\n")
    place = Place(file="demo.surg", line=1, column=17, start=16, end=27)
    step = step_of(tmp_path, "tensorboard", report=ReportPlan(name="tensorboard", place=place))
    with pytest.raises(SurgError, match="SURG071") as raised:
        train(step, data(), tmp_path / "run", progress=False)
    (found,) = raised.value.diagnostics
    assert found.span is not None and found.span.line == 1 and "not logged in" in found.message
    assert step.step == 0 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SurgError, match="SURG063") as raised:
        check_installed(step_of(tmp_path, name).plan, tmp_path)
    assert raised.value.diagnostics[0].help == f'pip install "surg[{name}]"'


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No tracker reaches a network from here."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    yield


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_take_the_rows_and_a_resumed_run(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    pytest.importorskip(name)

    def interrupt(step: FakeStep) -> None:
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    report = ReportPlan(name=name, project="tests")  # type: ignore[arg-type]
    first = step_of(tmp_path, name, report=report)
    first.hook = interrupt
    assert train(first, data(), tmp_path / "run", progress=False).interrupted
    identity = load_state(tmp_path / "run").extra["identity"]
    second = step_of(tmp_path, name, report=report)
    second.load_state_dict(load_state(tmp_path / "run").state)
    train(second, data(), tmp_path / "run", resume=True, progress=False)
    assert load_state(tmp_path / "run").extra["identity"] == identity
    assert not [warning for warning in recwarn if "SURG071" in str(warning.message)]
    assert capfd.readouterr().out == ""
    if name == "wandb":
        assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}"))) == 2
    else:
        import sqlite3

        (database,) = (tmp_path / "trackio").glob("*.db")
        with sqlite3.connect(database) as connection:
            steps = [row[0] for row in connection.execute("SELECT step FROM metrics ORDER BY step")]
        assert steps == [1, 2, 3, 5, 6]
