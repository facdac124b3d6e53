"""`surgery train` over two processes against one: the same losses, evaluations and states, in both scopes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.cli import main
from tests.processes import LITERAL, run_together, save_folder, spec

# Sums of float64 in another order.
TOLERANCE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
FLOAT32: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
MLP = (19, 12)  # the shape of a W, of which the processes hold 10 and 9 rows

SPECS = {
    # the last batch of an epoch has one row, and one process then none
    "literal": spec(LITERAL, step="batch = 13  micro_batch = 2", more="train model.norm"),
    "packed": spec("lora(rank = 2)", data="max_length = 48  pack = true", step="batch = 2"),
    "dora": spec("dora(rank = 2)", step="batch = 4  micro_batch = 2"),
    "masked": spec("sqft(rank = 2)", step="batch = 4  recompute = blocks"),
    "transposed": spec(LITERAL, "transformer.h.*.mlp.c_fc", "gpt2"),
    # torch multiplies rows of experts in no wider dtype
    "experts": spec("lora(rank = 2)", "model.layers.*.mlp.experts.{gate_up,down}_proj", "mixtral", "float32"),
    # three steps of each block: the save after the third is that between them
    "blocks": spec("lora(rank = 2)", more="train model.norm").replace("steps = 6", "freeze **.A  steps = 3")
    + "step { batch = 3  optimizer = sgd(lr = 0.1, momentum = 0.9)  steps = 3 }",
}
GRAPH = ("literal", "packed", "blocks")
MODULE = ("literal", "dora", "masked", "transposed", "experts", "blocks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: `one/NAME` by one process in graph scope, `graph/NAME` and `module/NAME` by two."""
    folder = tmp_path_factory.mktemp("processes")
    save_folder(folder)
    for name, text in SPECS.items():
        (folder / f"{name}.surg").write_text(text)
        train(folder, name, folder / "one" / name)
    train(folder, "literal", folder / "alone" / "literal", "--scope", "module")
    begun(folder / "alone" / "literal", folder / "resumed" / "by_two")
    begun(folder / "one" / "literal", folder / "resumed" / "by_two_in_graph_scope")
    commands = [command(folder, name, folder / "module" / name, "--scope", "module") for name in MODULE]
    commands += [command(folder, name, folder / "graph" / name) for name in GRAPH]
    commands += [["train", str(folder / "resumed" / run), "--resume", "--device", "cpu"]
                 for run in ("by_two", "by_two_in_graph_scope")]  # fmt: skip
    run_together(folder, commands, whole=MLP)
    for run in ("module", "graph"):
        begun(folder / run / "literal", folder / "resumed" / f"by_one_{run}")
        finish("train", str(folder / "resumed" / f"by_one_{run}"), "--resume", "--device", "cpu")
    return folder


def command(folder: Path, name: str, run: Path, *more: str) -> list[str]:
    return ["train", str(folder / f"{name}.surg"), "-o", str(run), "--device", "cpu", *more]


def train(folder: Path, name: str, run: Path, *more: str) -> None:
    finish(*command(folder, name, run, *more))


def finish(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code


def begun(run: Path, target: Path) -> None:
    """A run as it was after its third step."""
    shutil.copytree(run / "saves" / "step-000003", target)
    training = json.loads((target / "training.json").read_text())
    (target / "training.json").write_text(json.dumps(training | {"folder": "../.."}))


def rows(run: Path, *names: str) -> list[list[float]]:
    found = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == list(range(6))
    return [[row[name] for row in found if name in row] for name in names]


def check_same(run: Path, other: Path, tolerance: dict[str, Any] = TOLERANCE) -> None:
    """Losses, gradient norms, tokens, evaluations, the state, and who wrote it."""
    names = ("loss", "gradient_norm", "tokens", "eval_loss")
    for found, expected in zip(rows(run, *names), rows(other, *names), strict=True):
        assert len(found) in (6, 2)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **tolerance)
    for file in ("adapters.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(run / file), load_file(other / file)
        ours, theirs = ({k: v for k, v in state.items() if "random" not in k} for state in (ours, theirs))
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("name", GRAPH)
def test_two_processes_take_the_steps_of_one(folder: Path, name: str) -> None:
    check_same(folder / "graph" / name, folder / "one" / name)
    assert (folder / "graph" / name / "step.py").read_bytes() == (folder / "one" / name / "step.py").read_bytes()


@pytest.mark.parametrize("name", MODULE)
def test_two_processes_hold_one_model(folder: Path, name: str) -> None:
    check_same(folder / "module" / name, folder / "one" / name, FLOAT32 if name == "experts" else TOLERANCE)


def test_module_scope_takes_the_steps_of_graph_scope(folder: Path) -> None:
    check_same(folder / "alone" / "literal", folder / "one" / "literal")
    texts = {(folder / run / "literal" / "step.py").read_bytes() for run in ("alone", "module")}
    assert len(texts) == 1


@pytest.mark.parametrize("name", ["literal", "dora", "masked"])
@pytest.mark.parametrize("process", [0, 1])
def test_no_process_has_a_whole_weight(folder: Path, name: str, process: int) -> None:
    found = json.loads((folder / "module" / name / f"whole.{process}.json").read_text())
    assert found["whole"] == [0]
    # gate and up of two layers: what events move is known to the step
    assert found["rows"] == ([[10, 9][process]] * 4 if name == "literal" else [])
    other = json.loads((folder / "graph" / "literal" / f"whole.{process}.json").read_text())
    assert other["whole"][0] >= 4  # in graph scope they are there, and found


@pytest.mark.parametrize("run", ["by_two", "by_two_in_graph_scope", "by_one_module", "by_one_graph"])
def test_a_run_goes_on_with_another_number_of_processes(folder: Path, run: str) -> None:
    check_same(folder / "resumed" / run, folder / "one" / "literal")


def test_a_run_of_two_processes_is_a_run(folder: Path) -> None:
    """W, which was never whole anywhere, is in the folder as one process writes it."""
    path = "model.layers.1.mlp.up_proj"
    saved = load_file(folder / "one" / "literal" / "adapters.safetensors")
    moved = saved[f"{path}.weight"]
    expected = moved + 4 / 2 * saved[f"{path}.B"].double() @ saved[f"{path}.A"].double()
    found = surgery.load(folder / "module" / "literal").effective_weight(path)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    start = load_file(folder / "llama" / "model.safetensors")[f"{path}.weight"]
    assert not torch.allclose(moved, start, rtol=1e-3)


def test_the_first_process_alone_writes(folder: Path) -> None:
    for run in ("graph", "module"):
        saves = sorted(path.name for path in (folder / run / "literal" / "saves").iterdir())
        assert saves == ["step-000003"]
