"""The verbs on a real model, small: train, interrupt, resume, evaluate, merge, step.py alone, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from surgery.compiler.pipeline import PASSES
from surgery.runtime import alone
from surgery.runtime.data import Stream, load_data
from surgery.runtime.run_folder import all_finite, load_state
from tests.command_line import cli, succeed
from tests.project import save_project

pytestmark = pytest.mark.usefixtures("captured_once")

ROOT = Path(__file__).parents[3]
SPEC = """
model "tiny" { task = sequence_classification(labels = 2) }

adapt **.self.{query,value} { with lora(rank = 2, dropout = 0.1)  expect 4 }

train classifier

step {
    optimizer = adamw(lr = 1e-2)  schedule = linear(warmup = 0.1)  batch = 8  steps = 12
    clip = 1.0  seed = 3  evaluate = every(5)  save = every(4)  log = every(4)
}

data "rows.jsonl" { text = "{text}"  label = kind  holdout = 0.25 }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and a spec; runs go elsewhere."""
    folder = tmp_path_factory.mktemp("project")
    save_project(folder)
    (folder / "spec.surg").write_text(SPEC)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run from beginning to end."""
    run = folder / "runs" / "whole"
    succeed("train", str(folder / "spec.surg"), "-o", str(run), "--device", "cpu")
    return run


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Path:
    """The spec compiled, not run."""
    succeed("compile", str(folder / "spec.surg"), "-o", str(folder / "compiled"), "--device", "cpu")
    return folder / "compiled"


def losses(run: Path) -> list[float]:
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


def edited(folder: Path, name: str, old: str, new: str) -> str:
    assert old in SPEC
    (folder / name).write_text(SPEC.replace(old, new))
    return str(folder / name)


def test_check_and_plan(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spec = str(folder / "spec.surg")
    assert json.loads(cli(capsys, "check", spec, "--format", "json")[1]) == {"diagnostics": []}
    code, out, _ = cli(capsys, "plan", spec, "-o", str(tmp_path / "plan.json"))
    assert code == 0 and "layer.[0..1].attention.self.query" in out and "rank <= 2" in out and "4 sites" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written == json.loads(cli(capsys, "plan", spec, "--format", "json")[1])
    assert written["totals"]["sites"] == 4


def test_verbose_has_a_numbered_line_for_every_pass(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = edited(folder, "verbose.surg", "lora(rank = 2, dropout = 0.1)", "lora(rank = 2)  strategy = branch")
    code, out, log = cli(capsys, "compile", spec, "-v", "-o", str(tmp_path / "out"), "--device", "cpu")
    lines = [re.fullmatch(r"(\d)  (p\d_\w+) +(\d+\.\d\d) s  (.+)", line) for line in log.splitlines()]
    passes = [module.__name__.rpartition(".")[2] for module in PASSES]
    assert code == 0 and "4 sites" in out
    assert [(line[1], line[2]) for line in lines if line] == [(name[1], name) for name in passes]
    said = {line[2]: line[4] for line in lines if line}
    assert said["p1_parse"] == "1 model, 1 adapt, 1 train, 1 step, 1 data" and said["p2_check"] == "1 rule"
    assert said["p3_resolve"] == "4 sites of 1 equation" and said["p4_choose"] == "4 branch with low_rank_linear"
    assert re.fullmatch(r"4 uses; \d+ nodes to \d+", said["p6_rewrite"])
    assert re.fullmatch(r"4 branch with low_rank_linear; \d+ nodes to \d+", said["p7_lower"])
    assert said["p8_optimize"].startswith("2 groups of sites that read one input; ")
    code, _, log = cli(capsys, "plan", spec, "-v")
    assert code == 0 and [line.split()[1] for line in log.splitlines()] == passes[:4]
    assert cli(capsys, "plan", spec)[2] == ""


def test_a_hub_that_cannot_be_reached_is_a_warning_for_check(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = edited(folder, "hub.surg", '"tiny"', '"no-such-org/no-such-model"')
    code, out, _ = cli(capsys, "check", spec, "--format", "json")
    (found,) = json.loads(out)["diagnostics"]
    assert code == 0 and found["severity"] == "warning" and found["code"] == "SURG030"
    assert cli(capsys, "plan", spec)[0] == 1
    local = edited(folder, "local.surg", '"tiny"', '"./no_such_folder"')
    assert cli(capsys, "check", local)[0] == 1


def test_a_run_learns_and_keeps_its_records(whole: Path) -> None:
    values = losses(whole)
    assert len(values) == 12 and values[-1] < values[0]
    rows = [json.loads(row) for row in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 9, 11]
    state = load_state(whole)
    assert state.step == 12 and state.extra["labels"] == ["a", "b"]
    assert state.spec and "def " in state.source


def test_evaluate_merge_and_reload_with_plain_transformers(
    whole: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = cli(capsys, "eval", str(whole), "--format", "json", "--device", "cpu")
    result = json.loads(out)
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert code == 0 and result["rows"] == 15
    assert result["accuracy"] == last["eval_accuracy"] and result["loss"] == last["eval_loss"]

    assert cli(capsys, "merge", str(whole), "-o", str(tmp_path / "merged"))[0] == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert type(model) is BertForSequenceClassification and model.config.id2label == {0: "a", 1: "b"}
    state = load_state(whole)
    rows = load_data(state.plan, state.folder, AutoTokenizer.from_pretrained(tmp_path / "merged")).held_out
    assert rows is not None
    batch = rows.batch(range(len(rows)))
    with torch.no_grad():
        output = model(**batch)
    assert output.loss.item() == pytest.approx(result["loss"], rel=1e-5)
    assert (output.logits.argmax(-1) == batch["labels"]).float().mean().item() == pytest.approx(result["accuracy"])
    assert cli(capsys, "merge", str(whole), "-o", str(tmp_path / "merged"))[0] == 1  # never over what is there


def test_step_py_alone_has_the_same_losses(
    folder: Path, whole: Path, compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"plan.json", "adapters.safetensors", "graph.py", "step.py"} <= set(os.listdir(compiled))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = ["--data", str(folder / "rows.jsonl"), "--device", "cpu"]
    done = subprocess.run([sys.executable, str(compiled / "step.py"), *arguments], env=environment,
                          capture_output=True, text=True, cwd=folder.parent)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert alone.main(str(whole / "step.py"), arguments) == 0  # a trained run begins anew
    for out in (done.stdout, capsys.readouterr().out):
        said = {int(line.split()[1]): float(line.split()[3]) for line in out.splitlines()}
        expected = losses(whole)
        assert set(said) >= {3, 7, 11} and all(loss == expected[step] for step, loss in said.items())


def test_a_compiled_folder_trains_to_the_same_losses(
    folder: Path, whole: Path, compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(compiled, folder / "trained")
    code, out, _ = cli(capsys, "train", str(run), "--device", "cpu", "--format", "json")
    assert code == 0 and json.loads(out)["steps"] == 12 and losses(run) == losses(whole)
    assert cli(capsys, "train", str(run))[0] == 2  # holds a run
    assert cli(capsys, "train", str(folder / "spec.surg"), "-o", str(run))[0] == 2


def test_ctrl_c_leaves_a_run_that_continues_bitwise(
    folder: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, run = str(folder / "spec.surg"), folder / "runs" / "interrupted"
    batch = Stream.batch

    def interrupting(stream: Stream, step: int) -> dict[str, torch.Tensor]:
        if step == 5:  # inside an epoch of six batches
            os.kill(os.getpid(), signal.SIGINT)
        return batch(stream, step)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "batch", interrupting)
        code, out, err = cli(capsys, "train", spec, "-o", str(run), "--device", "cpu", "--format", "json")
    assert code == 130 and json.loads(out)["steps"] == 6 and json.loads(out)["interrupted"]
    assert f"surgery train {run} --resume" in err
    assert load_state(run).step == 6 == len(losses(run))

    torch.manual_seed(17)
    assert cli(capsys, "train", str(run), "--resume", "--device", "cpu")[0] == 0
    assert losses(run) == losses(whole)
    first, second = load_state(run).state["weights"], load_state(whole).state["weights"]
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_an_edited_step_py_runs_alone_and_only_alone(
    folder: Path, whole: Path, compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shutil.copytree(compiled, folder / "edited") / "step.py"
    file.write_text(file.read_text().replace("def train_step(", "print('edited')\n\n\ndef train_step(", 1))
    code, _, err = cli(capsys, "train", str(file.parent), "--device", "cpu")
    assert code == 1 and "SURG054" in err and "edited" in err
    assert alone.main(str(file), ["--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "edited" and f"loss {losses(whole)[-1]!r}" in said[-1]


def test_a_run_of_another_spec_is_not_resumed(folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = edited(folder, "other.surg", "rank = 2", "rank = 3")
    code, _, err = cli(capsys, "train", spec, "-o", str(whole), "--resume")
    assert code == 1 and "SURG054" in err and "another spec" in err
    same = folder / "commented.surg"
    same.write_text("# a comment more\n" + SPEC)
    code, out, _ = cli(capsys, "train", str(same), "-o", str(whole), "--resume", "--device", "cpu")
    assert code == 0 and out == f"{whole}: nothing is left to do, its {len(losses(whole))} steps are done\n"


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("adamw(lr = 1e-2)", "sgd(lr = 1e38)", "SURG053", "at step"),
        ("label = kind", "label = knid", "SURG051", "did you mean `kind`?"),
        ('"rows.jsonl"', '"raws.jsonl"', "SURG050", "no such file"),
        ("labels = 2", "labels = 3", "SURG052", "has 2 labels, the model 3"),
        ("holdout = 0.25", "holdout = 0.999", "SURG052", "to train on"),
    ],
)
def test_what_goes_wrong_in_a_run(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, old: str, new: str, code: str, words: str
) -> None:
    spec = edited(folder, "wrong.surg", old, new)
    status, out, _ = cli(capsys, "train", spec, "-o", str(tmp_path / "run"), "--format", "json", "--device", "cpu")
    found: list[dict[str, Any]] = json.loads(out)["diagnostics"]
    text = json.dumps(found, ensure_ascii=False)
    assert status == 1 and [entry["code"] for entry in found] == [code] and words in text
    if code != "SURG053":
        assert found[0]["line"] == SPEC[: SPEC.index('data "rows')].count("\n") + 1
    else:
        state = load_state(tmp_path / "run")
        assert all_finite(state.state["weights"])
