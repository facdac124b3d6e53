"""kill -9 of `surgery train` at random moments: the losses of what is resumed are those of an unbroken run, to the bit.

A few moments; `SURGERY_KILLS=20 pytest tests/surgery/cli/test_kill.py` takes twenty.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from surgery.runtime.run_folder import is_run, load_state
from tests.command_line import succeed
from tests.project import save_project

ROOT = Path(__file__).parents[3]
KILLS = int(os.environ.get("SURGERY_KILLS", "2"))
STEPS = 90
SPEC = f"""
model "tiny" {{ task = sequence_classification(labels = 2) }}
adapt **.self.{{query,value}} {{ with delta_lora(rank = 2, start = 5)  update = literal }}
train classifier
step {{
    optimizer = adamw(lr = 3e-3)  schedule = cosine(warmup = 0.1)  batch = 8  micro_batch = 4  steps = {STEPS}
    clip = 1.0  seed = 3  evaluate = every(7)  save = every(3, keep = 2)  log = every(1)
    best = accuracy  stop = patience(100)  report = tensorboard
}}
data "rows.jsonl" {{ text = "{{text}}"  label = kind  holdout = 0.25 }}
"""


def begin(folder: Path, run: Path) -> subprocess.Popen[bytes]:
    """The command that a user types: to begin, or to resume what is there."""
    arguments = ["train", str(run), "--resume"] if is_run(run) else ["train", "spec.surg", "-o", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = f"from surgery.cli import main; main({[*arguments, '--device', 'cpu']!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def rows(run: Path) -> list[dict[str, Any]]:
    """The whole rows of metrics, without what is timed."""
    found = []
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            row.pop("seconds")
            found.append(row)
    return found


def kill_behind(process: subprocess.Popen[bytes], run: Path, step: int, wait: float) -> bool:
    """Kill it some time after the row of a step is there, or while it begins; whether it was still running."""
    until = time.monotonic() + 300
    while step >= 0 and process.poll() is None and time.monotonic() < until:
        if any(row["step"] == step for row in rows(run)[-3:]):
            break
        time.sleep(0.002)
    time.sleep(wait)
    running = process.poll() is None
    process.kill()
    _, said = process.communicate()
    assert running or process.returncode == 0, said.decode()
    return running


def test_a_killed_run_has_the_losses_of_an_unbroken_one(tmp_path: Path) -> None:
    save_project(tmp_path)
    (tmp_path / "spec.surg").write_text(SPEC)
    whole, run = tmp_path / "whole", tmp_path / "run"
    succeed("train", str(tmp_path / "spec.surg"), "-o", str(whole), "--device", "cpu")
    expected = rows(whole)
    assert len(expected) == STEPS and expected[0]["gradient_norm"] > 0

    chance = random.Random(KILLS)
    # The first while it begins, the others in the run, one after the other.
    moments = [-1, *sorted(chance.sample(range(1, STEPS - 5), KILLS - 1))]
    for step in moments:
        wait = chance.uniform(0, 8) if step < 0 else chance.uniform(0, 0.15)
        assert kill_behind(begin(tmp_path, run), run, step, wait)
        assert rows(run) == expected[: len(rows(run))]
    process = begin(tmp_path, run)
    assert process.wait() == 0, process.stderr and process.stderr.read().decode()

    assert rows(run) == expected
    for folder in (".", "best", *(f"saves/{save.name}" for save in (whole / "saves").iterdir())):
        found, kept = load_state(run / folder), load_state(whole / folder)
        assert found.step == kept.step and found.extra["best"] == kept.extra["best"]
        for name, tensor in kept.state["weights"].items():
            assert torch.equal(found.state["weights"][name], tensor)
    assert sorted(save.name for save in (run / "saves").iterdir()) == sorted(
        save.name for save in (whole / "saves").iterdir()
    )
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    assert [event.step for event in read.Scalars("train/loss")] == list(range(STEPS))
