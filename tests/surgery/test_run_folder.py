"""Run folders: what is saved comes back to the bit, and no crash or foreign file leaves half a run."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.compiler.diagnostics import SurgError
from surgery.compiler.plan import ModelPlan, Plan, Totals
from surgery.runtime import run_folder
from surgery.runtime.run_folder import all_finite, keep_save, load_state, save_step
from surgery.runtime.structure import pack, unpack

pytestmark = pytest.mark.usefixtures("captured_once")


class State:
    """As much of a training step as is saved."""

    def __init__(self, folder: Path, value: float = 1.0, step: int = 0) -> None:
        self.folder = folder
        self.source = f"# step {value}\n"
        self.plan = Plan(
            spec='model "tiny"\n', file="demo.surg", sites=(), formulas={}, tokens=0,
            model=ModelPlan(source="hub", name="tiny"),
            totals=Totals(sites=0, trainable=0, frozen=0, model=1, share=0.0),
        )  # fmt: skip
        self.value, self.step = value, step

    def state_dict(self) -> dict[str, Any]:
        tied = torch.full((2, 3), self.value)
        moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(5).to(torch.bfloat16)}}
        groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0], "foreach": None}]
        return {
            "weights": {"a.A": tied, "a.tied": tied, "view": torch.arange(12.0)[3:5]},
            "optimizer": {"state": moments, "param_groups": groups},
            "step": self.step,
            "random": {"cpu": torch.get_rng_state(), "cuda": None},
            "scaler": {"scale": math.inf},
        }


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and all(map(equal, left, right))
    return type(left) is type(right) and bool(left == right)


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = State(tmp_path, step=7)
    expected = state.state_dict()
    state.state_dict = lambda: expected  # type: ignore[method-assign]
    save_step(state, tmp_path / "run", {"labels": ["x"]})
    loaded = load_state(tmp_path / "run")
    assert equal(loaded.state, expected)
    assert loaded.step == 7 and loaded.extra == {"labels": ["x"]}
    assert loaded.folder == tmp_path.resolve() and loaded.source == state.source
    assert loaded.plan == state.plan and loaded.spec == state.plan.spec
    assert sorted(os.listdir(tmp_path / "run")) == sorted(run_folder.STATE_FILES)


def test_saving_again_keeps_what_the_run_knows(tmp_path: Path) -> None:
    save_step(State(tmp_path), tmp_path / "run", {"labels": ["x"]})
    save_step(State(tmp_path, 2.0, 1), tmp_path / "run")
    assert load_state(tmp_path / "run").extra == {"labels": ["x"]}


def test_a_crash_at_any_moment_leaves_one_whole_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    calls, limit = 0, 0

    def crashing(function: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == limit:
                raise Crash
            return function(*arguments, **options)

        return run

    outcomes = []
    for limit in range(1, 100):  # noqa: B007
        run = tmp_path / f"run{limit}"
        save_step(State(tmp_path, 1.0, 1), run)
        calls = 0
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace"):
                patch.setattr(os, name, crashing(getattr(os, name)))
            try:
                save_step(State(tmp_path, 2.0, 2), run)
            except Crash:
                pass
            else:
                break
        loaded = load_state(run)  # without repairing
        value = loaded.state["weights"]["a.A"][0, 0].item()
        assert value == loaded.step and loaded.source == f"# step {value}\n"
        outcomes.append(loaded.step)
        save_step(State(tmp_path, 3.0, 3), run)
        assert load_state(run).step == 3
        assert sorted(os.listdir(run)) == sorted(run_folder.STATE_FILES)
    assert outcomes == sorted(outcomes) and {1, 2} == set(outcomes)


def test_earlier_saves_are_run_folders(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    for step in (200, 400, 600):
        save_step(State(tmp_path, float(step), step), run)
        keep_save(run, step, keep=2)
    assert sorted(os.listdir(run / "saves")) == ["step-000400", "step-000600"]
    loaded = load_state(run / "saves" / "step-000400")
    assert loaded.step == 400 and loaded.folder == tmp_path.resolve()


@pytest.mark.parametrize("name", run_folder.STATE_FILES)
@pytest.mark.parametrize("content", [None, b"", b"\xff\x00{", b"[]", b"[" * 100_000, b'{"version": 9}'])
def test_broken_folders_are_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    run = tmp_path / "run"
    save_step(State(tmp_path), run)
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    if name in (run_folder.SPEC, run_folder.STEP) and content not in (None, b"\xff\x00{"):
        load_state(run)  # any text may stand there
        return
    with pytest.raises(SurgError) as caught:
        load_state(run)
    assert [found.code for found in caught.value.diagnostics] == ["SURG054"]


def test_foreign_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SurgError, match="SURG054"):
            load_state(path)
    save_step(State(tmp_path), tmp_path / "run")
    (tmp_path / "run" / run_folder.COMMIT).write_text(json.dumps(["../../etc/passwd"]))
    with pytest.raises(SurgError, match="belong to no run"):
        load_state(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")


def test_structure_round_trip() -> None:
    value = {"a": [1, 2.5, None, True, "x", (1, (2,))], "b": {1: {"c": -math.inf}}, "$d": {"$tensor": "no"}}
    assert unpack(json.loads(json.dumps(pack(value, {}))), {}) == value
    with pytest.raises(TypeError, match="at `a.0`"):
        pack({"a": [object()]}, {})


def test_all_finite() -> None:
    assert all_finite({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)})
    assert not all_finite({"a": torch.tensor([1.0, math.nan])})
