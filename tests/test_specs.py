"""Every file in `specs/` is planned, those with a tiny model are trained, and the plan of a 70B shape is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery.cli import main
from surgery.runtime.data import load_data
from surgery.runtime.run_folder import load_state

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


def test_conversations_from_the_plan_to_a_merged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sft.surg` on the command line; then plain transformers says what the run says."""
    run, merged = tmp_path / "run", tmp_path / "merged"
    answers = {}
    verbs = {
        "plan": [str(SPECS / "sft.surg")],
        "train": [str(SPECS / "sft.surg"), "-o", str(run), "--device", "cpu"],
        "eval": [str(run), "--device", "cpu"],
        "merge": [str(run), "-o", str(merged)],
    }
    for verb, arguments in verbs.items():
        with pytest.raises(SystemExit) as ended:
            main([verb, *arguments, "--format", "json"])
        said = capsys.readouterr()
        assert not ended.value.code, said.err
        answers[verb] = json.loads(said.out)
    planned, held_out = answers["plan"]["sample"], answers["eval"]
    assert planned["steps_per_epoch"] * 3 == answers["train"]["steps"] and planned["padding"] < 0.03
    assert planned["example"]["parts"][1]["learned"] and planned["example"]["parts"][1]["text"].endswith("<|im_end|>\n")
    losses = [json.loads(row)["loss"] for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > 6.8 and held_out["perplexity"] < 150  # of 1,024 tokens
    assert held_out["loss"] == answers["train"]["evaluation"]["loss"]

    model = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    state = load_state(run)
    examples = load_data(state.plan, state.folder, tokenizer).held_out
    assert examples is not None
    total, count = 0.0, 0
    with torch.no_grad():
        for row in range(len(examples)):
            batch = examples.batch([row])
            labels = int(batch["labels"][:, 1:].ne(-100).sum())
            total, count = total + labels * float(model(**batch).loss), count + labels
    assert total / count == pytest.approx(held_out["loss"], rel=1e-5)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


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
