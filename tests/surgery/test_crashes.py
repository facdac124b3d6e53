"""A process that is killed before any one of its operations on files: who resumes cannot tell that it was."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.runtime.run_folder import is_run, load_state
from surgery.runtime.train import train
from tests.loop import FakeStep, data, losses

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share what is imported")

OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
# Saved after 2, 4 and 6 steps, of which two saves are kept; evaluated after 3, 6 and 7.
STRIDE = 1 if "SURGERY_KILLS" in os.environ else 11  # all of them take three minutes
SETTINGS: dict[str, Any] = {"steps": 7, "save": 2, "keep": 2, "evaluate": 3, "best": "loss"}


def train_or_resume(folder: Path) -> None:
    """What a user does after a crash: begin, or continue what is there."""
    step, run = FakeStep(folder, **SETTINGS), folder / "run"
    resume = is_run(run)
    if resume:
        step.load_state_dict(load_state(run).state)
    train(step, data(), run, resume=resume, progress=False)


def killed(work: Callable[[], None], folder: Path, moment: int) -> bool:
    """Do it in a process that is killed before its operation number `moment` on files of the folder; whether it was."""
    process = os.fork()
    if process == 0:
        left = moment

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event not in OPERATIONS:
                return
            # What a folder holds is removed by names that count from the folder's handle.
            if str(folder) in str(arguments[0]) or (event in ("os.remove", "os.rmdir") and arguments[1] != -1):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            torch.set_num_threads(1)  # the threads of the process that was forked are not here
            sys.addaudithook(count)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def listing(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def check_same(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole) and listing(run) == listing(whole)
    for folder in (".", "best", "saves/step-000004", "saves/step-000006"):
        found, expected = load_state(run / folder), load_state(whole / folder)
        assert found.step == expected.step and found.extra == expected.extra and found.folder == run.parent
        assert torch.equal(found.state["weights"]["w"], expected.state["weights"]["w"])
        assert torch.equal(found.state["random"]["cpu"], expected.state["random"]["cpu"])


def test_a_run_that_is_killed_anywhere_ends_as_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what was written outlives a process without it
    train_or_resume(tmp_path / "whole")
    whole = tmp_path / "whole" / "run"
    folder, moment, ends = tmp_path / "broken", 0, False
    while not ends:
        moment += STRIDE
        shutil.rmtree(folder, ignore_errors=True)
        ends = not killed(lambda: train_or_resume(folder), folder, moment)
        if not ends:
            for part in (folder / "run", folder / "run" / "best", *(folder / "run" / "saves").glob("step-*")):
                assert not is_run(part) or load_state(part).step <= SETTINGS["steps"]  # whole, or not there
            killed(lambda: train_or_resume(folder), folder, 1 + moment * 7 % 41)  # what puts it right is killed too
            train_or_resume(folder)
        check_same(folder / "run", whole)
    assert moment > 200
