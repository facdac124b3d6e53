"""`best`, `stop` and `report` on the command line: what is said, what is kept, what --best takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from surgery.runtime.run_folder import load_state
from tests.command_line import cli
from tests.project import save_project

pytestmark = pytest.mark.usefixtures("captured_once")

SPEC = """
model "tiny" { task = sequence_classification(labels = 2) }
adapt **.self.{query,value} { with lora(rank = 2)  expect 4 }
train classifier
step { optimizer = adamw(lr = 1e-1)  batch = 8  steps = 40  seed = 3  evaluate = every(2)  SETTINGS }
data "rows.jsonl" { text = "{text}"  label = kind  holdout = 0.25 }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    save_project(folder)
    return folder


def spec(folder: Path, name: str, settings: str) -> str:
    (folder / name).write_text(SPEC.replace("SETTINGS", settings))
    return str(folder / name)


def test_a_run_that_stops_keeps_its_best_state(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "runs" / "stopped"
    text = spec(folder, "stopped.surg", "best = loss  stop = patience(2)  report = tensorboard")
    code, out, err = cli(capsys, "train", text, "-o", str(run), "--device", "cpu", "--format", "json")
    said = json.loads(out)
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    values = {row["step"] + 1: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min(values, key=lambda steps: (values[steps], steps))
    assert code == 0 and said["stopped"] and not said["interrupted"] and said["steps"] == len(rows) < said["of"] == 40
    expected = {"score": "loss", "patience": 2, "value": values[best], "steps": best, "since": 2}
    assert said["best"] == expected and said["steps"] == best + 4
    assert f"stopped, since 2 evaluations were no better; best loss {values[best]:.4f} after {best} steps" in err
    assert list((run / "tensorboard").iterdir())

    last = json.loads(cli(capsys, "eval", str(run), "--format", "json", "--device", "cpu")[1])
    found = json.loads(cli(capsys, "eval", str(run), "--best", "--format", "json", "--device", "cpu")[1])
    assert (last["loss"], found["loss"]) == (rows[-1]["eval_loss"], values[best]) and found["loss"] < last["loss"]
    assert found["run"] == str(run / "best") and load_state(run / "best").step == best
    for name, more in (("last", ()), ("best", ("--best",))):
        assert cli(capsys, "merge", str(run), "-o", str(folder / "merged" / name), *more)[0] == 0
    weights = [
        load_file(folder / "merged" / name / "model.safetensors")["classifier.weight"] for name in ("last", "best")
    ]
    assert not weights[0].equal(weights[1])
    assert weights[1].equal(load_state(run / "best").state["weights"]["classifier.weight"])

    adapter = folder / "adapter"
    code, out, err = cli(capsys, "export", str(run), "--to", "peft", "-o", str(adapter), "--best", "--format", "json")
    assert code == 0 and json.loads(out)["run"] == str(run / "best"), err
    kept, of_run = load_state(run / "best").state["weights"], load_state(run).state["weights"]
    exported = load_file(adapter / "adapter_model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        (found_name,) = [key for key in exported if key.endswith(name)]
        assert exported[found_name].equal(kept[name]) and not exported[found_name].equal(of_run[name])

    for more, weights_step in (((), len(rows)), (("--best",), best)):
        code, out, err = cli(capsys, "report", str(run), *more, "--format", "json")
        report = json.loads(out)
        assert code == 0 and (report["step"], report["weights_step"]) == (len(rows), weights_step), err
        assert report["finished"] and report["best"] == expected
        assert len(report["metrics"]["loss"]["values"]) == len(rows)
        norms = {change["path"]: change["norm"] for change in report["changes"]}
        state = load_state(run / "best" if more else run)
        for site in state.plan.sites:
            A, B = (state.state["weights"][tensor.key].double() for tensor in site.tensors)
            assert norms[site.path] == pytest.approx(float((B @ A).norm()), rel=1e-6)  # alpha is the rank
    page = (folder / "best.html").resolve()
    assert cli(capsys, "report", str(run), "--best", "-o", str(page))[0] == 0
    shown = page.read_text()
    assert f"Change of the weights, after step {best:,}" in shown and f"as they were after step {best:,}" in shown

    code, out, err = cli(capsys, "train", str(run), "--resume", "--device", "cpu")
    assert code == 0 and len((run / "metrics.jsonl").read_text().splitlines()) == len(rows)


def test_a_run_without_a_best_state_has_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "runs" / "plain"
    text = spec(folder, "plain.surg", "").replace("steps = 40", "steps = 2")
    assert cli(capsys, "train", text, "-o", str(run), "--device", "cpu")[0] == 0
    for verb in ("eval", "generate"):
        more = ("--prompt", "a") if verb == "generate" else ()
        code, _, err = cli(capsys, verb, str(run), "--best", *more, "--device", "cpu")
        assert code == 1 and "SURG054" in err and "keeps no best state" in err and "best = loss" in err
    code, _, err = cli(capsys, "eval", str(folder / "none"), "--best")
    assert code == 1 and "there is no such folder" in err
    code, _, err = cli(capsys, "eval", str(text))
    assert code == 1 and "SURG054" in err and "it is a file" in err


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    text = spec(folder, "wandb.surg", 'report = wandb(project = "chats")')
    code, out, _ = cli(capsys, "train", text, "-o", str(folder / "runs" / "no"), "--format", "json", "--device", "cpu")
    (found,) = json.loads(out)["diagnostics"]
    assert code == 1 and found["code"] == "SURG063" and found["line"] == 5
    assert found["help"] == 'pip install "surg[wandb]"' and not (folder / "runs" / "no").exists()
