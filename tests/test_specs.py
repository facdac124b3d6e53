"""Every file in `specs/` is planned, those with a tiny model are trained, and the plan of a 70B shape is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import surgery

SPECS = Path(__file__).resolve().parent.parent / "specs"
FILES = sorted(SPECS.glob("*.surg"))

# Runs the command line, then writes seconds and the largest memory of this process (GiB) to standard error.
MEASURED = """
import resource, sys, time
from surgery.cli import main
start = time.perf_counter()
try:
    main(sys.argv[1:])
finally:
    unit = 2**30 if sys.platform == "darwin" else 2**20
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, file=sys.stderr)
"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_spec_is_planned(path: Path) -> None:
    plan = surgery.plan(surgery.parse(path))
    assert plan.totals.trainable > 0
    assert len({site.path for site in plan.sites}) == plan.totals.sites
    assert all(site.strategy and site.reason for site in plan.sites)


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.startswith("tiny_")], ids=lambda path: path.stem)
def test_a_tiny_spec_is_trained(path: Path) -> None:
    step = surgery.compile(surgery.parse(path))
    ids = torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    losses = [float(step({"input_ids": ids, "labels": ids}).loss) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_a_method_of_the_library_has_a_spec() -> None:
    texts = "\n".join(path.read_text() for path in FILES)
    for method in (SPECS.parent / "surgery" / "methods").glob("*.surg"):
        assert f"{method.stem}(" in texts, f"no spec in specs/ uses {method.stem}"


def test_the_plan_of_a_70b_shape_takes_little() -> None:
    command = [sys.executable, "-c", MEASURED, "plan", str(SPECS / "llama_3_70b.surg"), "--format", "json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    totals = json.loads(run.stdout)["totals"]
    assert totals["sites"] == 560 and totals["model"] == 70_553_706_496
    seconds, memory = map(float, run.stderr.split()[-2:])
    assert memory < 2 and seconds < 30, f"{seconds:.1f} s, {memory:.2f} GiB"
