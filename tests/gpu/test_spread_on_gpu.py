"""`surgery train` on two CUDA devices against one: the same losses and states to rounding, in both scopes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery.cli import main
from tests.processes import LITERAL, run_together, save_folder, spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

# float32 of a tiny model, whose products a GPU may split in other ways for other numbers of rows
LOSSES: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
STATES: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-3}
MLP = (19, 12)
SPECS = {
    "literal": spec(LITERAL, dtype="float32", step="batch = 13  micro_batch = 2  compile = off"),
    "dora": spec("dora(rank = 2)", dtype="float32", step="batch = 4  micro_batch = 2"),
    "compiled": spec("lora(rank = 2)", dtype="float32", step="batch = 4"),
}  # fmt: skip
RUNS = [("graph", "literal"), ("graph", "compiled"), ("module", "literal"), ("module", "dora")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs: `one/NAME` in graph scope on one device, `graph/NAME` and `module/NAME` on two."""
    folder = tmp_path_factory.mktemp("spread")
    save_folder(folder, torch.float32)
    for name, text in SPECS.items():
        (folder / f"{name}.surg").write_text(text)
        with pytest.raises(SystemExit) as ended:
            main(command(folder, "one", name)[:-2])
        assert not ended.value.code
    run_together(folder, [command(folder, scope, name) for scope, name in reversed(RUNS)], whole=MLP)
    return folder


def command(folder: Path, run: str, name: str) -> list[str]:
    scope = run if run == "module" else "graph"
    return ["train", str(folder / f"{name}.surg"), "-o", str(folder / run / name), "--device", "cuda", "--scope", scope]


def rows(run: Path, name: str) -> torch.Tensor:
    found = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row[name] for row in found if name in row])


@pytest.mark.parametrize(("scope", "name"), RUNS)
def test_two_devices_take_the_steps_of_one(folder: Path, scope: str, name: str) -> None:
    ours, theirs = folder / scope / name, folder / "one" / name
    for what in ("loss", "eval_loss", "tokens"):
        torch.testing.assert_close(rows(ours, what), rows(theirs, what), **LOSSES)
    assert len(rows(ours, "loss")) == 6
    found, expected = (load_file(run / "adapters.safetensors") for run in (ours, theirs))
    torch.testing.assert_close(found, expected, **STATES)


@pytest.mark.parametrize("name", ["literal", "dora"])
def test_no_device_has_a_whole_weight(folder: Path, name: str) -> None:
    for process, own in enumerate((10, 9)):
        found = json.loads((folder / "module" / name / f"whole.{process}.json").read_text())
        assert found["whole"] == [0]
        assert found["rows"] == ([own] * 4 if name == "literal" else [])
