"""`surgery rank`: ranks of known changes, constructed adapters in peft, and what cannot be compared."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.command_line import cli, succeed
from tests.comparisons import changed, codes, low_rank, noise, rank, refused, saved
from tests.project import save_project

SPEC = """
model "tiny" { task = sequence_classification(labels = 2) }
adapt **.self.{query,value} { with lora(rank = 2)  expect 4 }
adapt **.intermediate.dense { with METHOD }
train classifier
step { optimizer = adamw(lr = 1e-2)  batch = 8  steps = 3  seed = 3  compile = off }
data "rows.jsonl" { text = "{text}"  label = kind }
"""


@pytest.fixture
def llama(architectures: Any) -> Callable[..., nn.Module]:
    """A llama of two layers, or of as many as one says."""
    made: Callable[..., nn.Module] = architectures["llama"].model
    return made


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5"])
def test_ranks_of_known_changes_are_found_exactly(
    name: str, dtype: torch.dtype, architectures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = architectures[name].model().to(dtype)
    target, ranks = changed(base)
    found = rank(capsys, saved(base, tmp_path / "base"), saved(target, tmp_path / "target"), "--tolerance", "0.02")
    assert {name: row["rank"] for name, row in found["weights"].items() if row["size"]} == ranks
    assert {row["exact"] for row in found["weights"].values() if row["size"]} == set(ranks.values())
    own = dict(base.named_parameters())
    for name, row in found["weights"].items():
        delta = (target.get_parameter(name).double() - own[name].double()).detach().flatten(1)
        values = torch.linalg.svdvals(delta)
        torch.testing.assert_close(torch.tensor(row["singular_values"]).double(), values, rtol=1e-6, atol=1e-9)
        assert row["share"] == pytest.approx(float(delta.norm() / own[name].double().norm()), rel=1e-6)
        if row["size"]:
            assert row["suffices"] == int((values > 0.02 * values[0]).sum())
            assert row["relative_error"] == pytest.approx(float((*values, 0)[row["chosen"]] / values[0]), abs=1e-6)


def test_what_is_asked_for_is_measured(
    llama: Callable[..., nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = llama()
    target = copy.deepcopy(base)
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        target.get_parameter(name).add_(0.1 * noise(48, 32, seed=3).float())
    folders = saved(base, tmp_path / "base"), saved(target, tmp_path / "target")
    delta = (target.get_parameter(name).double() - base.get_parameter(name).double()).detach()
    values = torch.linalg.svdvals(delta)
    row = rank(capsys, *folders, "--tolerance", 0.3, "--norm", "frobenius", "--only", "**.up_proj")["weights"][name]
    lost = [float(values[at:].norm() / values.norm()) for at in range(33)]
    assert row["suffices"] == row["chosen"] == next(at for at, share in enumerate(lost) if share <= 0.3)
    assert row["relative_error"] == pytest.approx(lost[row["chosen"]], rel=1e-6)
    row = rank(capsys, *folders, "--tolerance", 0.5, "--absolute", "--rank", 8)["weights"][name]
    assert row["suffices"] == int((values > 0.5).sum()) and row["chosen"] == 8
    assert row["error"] == pytest.approx(float(values[8]), rel=1e-6)


def test_one_file_each_and_no_model_is_ever_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, architectures: Any
) -> None:
    base = architectures["llama"].model()
    target, ranks = changed(base)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    saved(target, tmp_path / "target")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()

    def never(*given: Any, **named: Any) -> None:
        raise AssertionError("a model was loaded whole")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    found = rank(capsys, tmp_path / "base", tmp_path / "target" / "model.safetensors")
    assert {name: row["rank"] for name, row in found["weights"].items()} == ranks
    tensors = {"a": noise(6, 5, seed=0), "b": torch.zeros(3), "c": torch.zeros(2, 3, 4), "d": torch.zeros(2, 2).int()}
    save_file(tensors, tmp_path / "one.safetensors")
    save_file(tensors | {"a": tensors["a"] + low_rank(tensors["a"], 2, 1)}, tmp_path / "other.safetensors")
    found = rank(capsys, tmp_path / "one.safetensors", tmp_path / "other.safetensors")
    assert found["weights"]["a"]["rank"] == 2
    reasons = {left["name"]: left["reason"] for left in found["left_out"]}
    assert reasons["b"] == "it is a vector" and "3 axes" in reasons["c"] and "I32" in reasons["d"]


def test_experts_one_by_one_in_files_and_stacked_in_a_run(
    architectures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = architectures["qwen3_moe"].model()
    target = copy.deepcopy(base)
    with torch.no_grad():
        for seed, parameter in enumerate(target.parameters()):
            if parameter.dim() == 3:
                parameter.add_(low_rank(parameter, 2, seed, stacked=True).float())
    folders = saved(base, tmp_path / "base"), saved(target, tmp_path / "target")
    changes = {name: row for name, row in rank(capsys, *folders)["weights"].items() if row["size"]}
    assert {row["rank"] for row in changes.values()} == {2} and all("experts" in name for name in changes)
    if any(".experts.0." in name for name in changes):  # what the module has as one parameter
        assert refused(capsys, *folders, "--adapters", tmp_path / "adapter")["code"] == "SURG064"
    spec = tmp_path / "a.surg"
    spec.write_text(
        f'model "{folders[0]}" {{ task = causal_lm }}\n'
        "adapt model.layers.*.mlp.experts.{gate_up_proj,down_proj} { with lora(rank = 3) }\n"
        "step { batch = 2  steps = 1  compile = off }"
    )
    succeed("compile", str(spec), "-o", str(tmp_path / "run"))
    tensors = load_file(tmp_path / "run" / "adapters.safetensors")
    moved = {key: noise(*value.shape, seed=at).float() for at, (key, value) in enumerate(tensors.items())}
    save_file(moved, tmp_path / "run" / "adapters.safetensors")
    found = rank(capsys, folders[0], tmp_path / "run", "--adapters", tmp_path / "adapter")["weights"]
    assert {row["rank"] for row in found.values()} == {3} and len(found) == 4
    assert {len(row["shape"]) for row in found.values()} == {3}
    again = rank(capsys, folders[0], tmp_path / "adapter")["weights"]
    for name, row in found.items():
        for one, other in zip(again[name]["singular_values"], row["singular_values"], strict=True):
            assert one == pytest.approx(other, rel=1e-5)


# --- what differs -----------------------------------------------------------------------------------------------------


def test_dtypes_that_differ_are_said_and_rounding_is_no_rank(
    llama: Callable[..., nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = llama()
    target, ranks = changed(base)
    folders = saved(base, tmp_path / "base"), saved(target.bfloat16(), tmp_path / "target")
    found = rank(capsys, *folders, "--except", "**.q_proj")
    assert codes(found) == ["SURG075"] and "F32" in str(found["diagnostics"]) and "BF16" in str(found["diagnostics"])
    assert {name: row["rank"] for name, row in found["weights"].items()} == {
        name: number for name, number in ranks.items() if "q_proj" not in name
    }
    rounded = rank(capsys, folders[0], saved(base.bfloat16(), tmp_path / "rounded"))
    assert {row["rank"] for row in rounded["weights"].values()} == {0}
    assert all(row["suffices"] > 0 == row["chosen"] for row in rounded["weights"].values())
    code, out, err = cli(capsys, "rank", *map(str, (folders[0], tmp_path / "rounded")), "--device", "cpu")
    assert not code and "would fit noise" in out and "warning[SURG075]" in err


def test_a_new_head_is_left_out_and_the_prefix_of_the_base_is_found(
    architectures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = architectures["bert"].model()
    target, ranks = changed(model)
    folders = saved(model.bert, tmp_path / "base"), saved(target, tmp_path / "target")
    found = rank(capsys, *folders)
    expected = {name.removeprefix("bert."): number for name, number in ranks.items() if name.startswith("bert.")}
    assert {name: row["rank"] for name, row in found["weights"].items()} == expected
    assert codes(found) == ["SURG075"] and "only the target has `classifier.bias`" in str(found["diagnostics"])
    back = rank(capsys, *reversed(folders))
    assert "only the base has `classifier.bias`" in str(back["diagnostics"])
    vectors = [left for left in found["left_out"] if left["reason"] == "it is a vector"]
    assert vectors and not any(left["changed"] for left in vectors)


@pytest.mark.parametrize("apart", [False, True])
def test_tied_weights(apart: bool, architectures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base: Any = architectures["qwen2"].model()
    target: Any = copy.deepcopy(base)
    inputs = architectures["qwen2"].inputs(4, 9)
    if apart:
        target.config.tie_word_embeddings = False
        target.lm_head.weight = nn.Parameter(target.lm_head.weight.detach().clone())
    with torch.no_grad():
        target.lm_head.weight += low_rank(target.lm_head.weight, 3, 1).float()
    folders = saved(base, tmp_path / "base"), saved(target, tmp_path / "target")
    found = rank(capsys, *folders, "--adapters", tmp_path / "adapter", "--dtype", "float64", "--tolerance", 0)
    ranks = {name: row["rank"] for name, row in found["weights"].items() if row["size"]}
    assert ranks == ({"lm_head.weight": 3} if apart else {"model.embed_tokens.weight": 3})
    assert codes(found) == (["SURG075", "SURG067"] if apart else ["SURG067"])
    with pytest.warns(UserWarning, match="tie"):
        adapted = peft.PeftModel.from_pretrained(base.double(), tmp_path / "adapter")
    expected = target.double()(**inputs).logits
    torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_models_of_two_architectures(
    llama: Callable[..., nn.Module], architectures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(llama(), tmp_path / "base")
    wider = saved(llama(intermediate_size=64), tmp_path / "wider")
    deeper = saved(llama(num_hidden_layers=3), tmp_path / "deeper")
    other = saved(architectures["t5"].model(), tmp_path / "other")
    found = refused(capsys, base, wider)
    assert found["code"] == "SURG074" and "6 weights have another shape" in found["message"]
    assert "`model.layers.0.mlp.down_proj.weight`: [32, 48] and [32, 64]" in found["notes"][0]
    assert "--except" in found["help"]
    assert len(rank(capsys, base, wider, "--only", "**.self_attn.*")["weights"]) == 8
    found = refused(capsys, base, deeper)
    assert found["code"] == "SURG074" and "9 weights are in blocks that the other has not" in found["message"]
    assert "it is in the target alone" in found["notes"][0]
    assert refused(capsys, base, other)["code"] == "SURG074"
    for option, pattern, near in (
        ("--only", "**.q_prj", "q_proj"), ("--except", "model.layers.*.mpl.up_proj", "mlp"),
        ("--only", "lm_hed", "lm_head"), ("--only", "model.layers", "model.layers.**"),
    ):  # fmt: skip
        found = refused(capsys, base, base, option, pattern)
        assert found["code"] == "SURG020" and f"`{pattern}`" in found["message"]
        assert found["help"] == f"did you mean `{near}`?" and found["file"] == option
    found = refused(capsys, base, base, "--only", "**.{q_proj,q_prj}")
    assert found["code"] == "SURG021" and found["help"] == "did you mean `q_proj`?"
    assert refused(capsys, base, base, "--only", "lm_head", "--except", "lm_head")["code"] == "SURG074"


def test_files_that_cannot_be_read(
    llama: Callable[..., nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(llama(), tmp_path / "base")
    assert refused(capsys, base, tmp_path / "nowhere")["code"] == "SURG030"
    found = refused(capsys, base, "nowhere")
    assert found["code"] == "SURG030" and "no folder here" in found["message"]
    (tmp_path / "empty").mkdir()
    found = refused(capsys, base, tmp_path / "empty")
    assert found["code"] == "SURG030" and "no model.safetensors" in found["message"]
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"nothing")
    found = refused(capsys, tmp_path / "empty", base)
    assert found["code"] == "SURG030" and "model.safetensors: " in found["message"]
    (tmp_path / "base" / "config.json").write_text("{")
    assert refused(capsys, base, base)["code"] == "SURG030"


# --- runs and adapters ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(("method", "number"), [("dora(rank = 2)", 24), ("lora(rank = 3)", 3), ("pissa(rank = 2)", 4)])
def test_a_run_its_merged_model_and_its_adapter_have_the_same_changes(
    method: str, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_project(tmp_path)
    (tmp_path / "a.surg").write_text(SPEC.replace("METHOD", method))
    run, merged, adapter = tmp_path / "run", tmp_path / "merged", tmp_path / "adapter"
    succeed("train", str(tmp_path / "a.surg"), "-o", str(run), "--device", "cpu")
    succeed("merge", str(run), "-o", str(merged))
    base = tmp_path / "tiny"
    found = rank(capsys, base, run)["weights"]
    stored = rank(capsys, base, merged)["weights"]
    inner = "bert.encoder.layer.1.intermediate.dense.weight"
    assert {row["rank"] for name, row in found.items() if ".self." in name} == {2}
    assert found["classifier.weight"]["rank"] == 2
    assert found[inner]["rank"] <= number
    assert {name for name, row in stored.items() if row["size"]} == set(found)
    sources = [stored]
    if "dora" not in method:
        assert found[inner]["rank"] == number
        succeed("export", str(run), "--to", "peft", "-o", str(adapter))
        sources.append(rank(capsys, base, adapter)["weights"])
    for name, row in found.items():
        for source in sources:
            others = (*source[name]["singular_values"], *[0.0] * 24)
            assert others[: len(row["singular_values"])] == pytest.approx(row["singular_values"], rel=1e-3, abs=2e-6)
    drawn = rank(capsys, base, run, "--adapters", tmp_path / "again", "--only", "**.self.*")
    assert drawn["adapters"] and rank(capsys, base, tmp_path / "again")["weights"].keys() == drawn["weights"].keys()


def test_a_run_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], llama: Any) -> None:
    save_project(tmp_path)
    (tmp_path / "a.surg").write_text(SPEC.replace("METHOD", "lora(rank = 2)"))
    succeed("compile", str(tmp_path / "a.surg"), "-o", str(tmp_path / "run"))
    other = saved(llama(), tmp_path / "other")
    assert refused(capsys, other, tmp_path / "run")["code"] in ("SURG031", "SURG074")
    assert refused(capsys, tmp_path / "run", other)["message"].endswith("the base has to be a model")
    (tmp_path / "copy").symlink_to(tmp_path / "tiny")
    found = rank(capsys, tmp_path / "copy", tmp_path / "run")
    assert codes(found) == ["SURG075"] and "was trained from" in found["diagnostics"][0]["message"]
    (tmp_path / "run" / "adapters.safetensors").write_bytes(b"")
    assert refused(capsys, tmp_path / "tiny", tmp_path / "run")["code"] == "SURG054"


# --- constructed adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5"])
def test_adapters_of_the_exact_ranks_are_the_target_in_peft(
    name: str, architectures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = architectures[name]
    base = architecture.model().double()
    target, ranks = changed(base)
    folders = saved(base, tmp_path / "base"), saved(target, tmp_path / "target")
    adapter = tmp_path / "adapter"
    rank(capsys, *folders, "--adapters", adapter, "--dtype", "float64", "--tolerance", 0)
    tensors = load_file(adapter / "adapter_model.safetensors")
    written = sorted(
        min(tensor.shape) if tensor.dim() == 2 else len(tensor) for key, tensor in tensors.items() if "_A" in key
    )
    assert written[-4:] == sorted(ranks.values())[-4:]
    inputs = {key: value.double() if value.is_floating_point() else value
              for key, value in architecture.inputs(4, 9).items()}  # fmt: skip
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).eval()
    expected = target(**inputs).logits
    assert float((expected - base(**inputs).logits).abs().max()) > 1e-3
    torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=1e-9, atol=1e-9)


def test_adapters_of_a_lower_rank_miss_by_what_was_predicted(
    llama: Callable[..., nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = llama().double()
    target = copy.deepcopy(base)
    with torch.no_grad():
        for seed, parameter in enumerate(target.parameters()):
            parameter.add_(0.05 * noise(*parameter.shape, seed=seed))
    folders = saved(base, tmp_path / "base"), saved(target, tmp_path / "target")
    options = [
        "--adapters",
        tmp_path / "adapter",
        "--dtype",
        "float64",
        "--only",
        "**.self_attn.*",
        "--only",
        "**.mlp.*",
    ]
    found = rank(capsys, *folders, *options, "--rank", 5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["task_type"]) == (5, {}, "CAUSAL_LM")
    merged: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload()
    assert len(found["weights"]) == 14
    for name, row in found["weights"].items():
        missed = torch.linalg.matrix_norm((target.get_parameter(name) - merged.get_parameter(name)).detach(), 2)
        assert float(missed) == pytest.approx(row["error"], rel=1e-9)
    # the same in the language, and as a target
    spec, run = tmp_path / "again.surg", tmp_path / "run"
    succeed("import", str(tmp_path / "adapter"), "-o", str(spec), "--run", str(run))
    for again in (run, tmp_path / "adapter"):
        weights = rank(capsys, folders[0], again)["weights"]
        assert {row["rank"] for row in weights.values()} == {5} and len(weights) == 14


def test_adapters_that_cannot_be_written(
    architectures: Any, llama: Callable[..., nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = llama()
    folders = saved(base, tmp_path / "base"), saved(changed(base)[0], tmp_path / "target")
    files = [folder / "model.safetensors" for folder in folders]
    adapter = tmp_path / "adapter"
    found = refused(capsys, *files, "--adapters", adapter)
    assert found["code"] == "SURG064" and "--task" in found["help"]
    assert refused(capsys, folders[0], folders[0], "--adapters", adapter)["code"] == "SURG064"
    adapter.mkdir()
    (adapter / "mine").touch()
    assert refused(capsys, *folders, "--adapters", adapter)["code"] == "SURG064"
    assert cli(capsys, "rank", *map(str, folders), "--adapters", str(adapter / "mine"))[0] == 2
    assert cli(capsys, "rank", *map(str, folders), "--task", "poetry")[0] == 2


# --- what is written --------------------------------------------------------------------------------------------------


def test_tables_plots_and_json(
    llama: Callable[..., nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    base = llama()
    target, _ = changed(base)
    folders = [str(saved(base, tmp_path / "base")), str(saved(target, tmp_path / "target"))]
    files = [tmp_path / name for name in ("a.png", "a.svg")]
    arguments = [*folders, "--group", "**.o_proj @ **.q_proj", "--json", str(tmp_path / "a.json"), "--device", "cpu"]
    for file in files:
        arguments += ["--plot", str(file)]
    code, out, err = cli(capsys, "rank", *arguments)
    assert not code, err
    assert "model.layers.[0..1].mlp.down_proj" in out and "spectral norm" in out and "left out: 5 tensors" in out
    assert "model.layers.0.self_attn.o_proj @ model.layers.0.self_attn.q_proj" in out and str(files[0]) in out
    assert files[0].read_bytes().startswith(b"\x89PNG")
    before = [file.read_bytes() for file in files]
    assert ElementTree.parse(files[1]).getroot().tag.endswith("svg")
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures == json.loads(cli(capsys, "rank", *arguments, "--format", "json")[1])
    assert before == [file.read_bytes() for file in files]
    shown = [cli(capsys, "rank", *folders, *more, "--device", "cpu")[1] for more in ([], ["-v"])]
    assert "[0..1]" in shown[0] and "[0..1]" not in shown[1] and "model.layers.1.mlp.down_proj " in shown[1]
    for wrong in (["--plot", str(tmp_path / "a.pdf")], ["--json", str(tmp_path / "nowhere" / "a.json")]):
        assert cli(capsys, "rank", *folders, *wrong)[0] == 2


def test_a_plot_without_matplotlib(
    llama: Callable[..., nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(llama(), tmp_path / "base")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = refused(capsys, base, base, "--plot", tmp_path / "a.png")
    assert found["code"] == "SURG063" and "surg[plot]" in found["help"]
    assert len(rank(capsys, base, base)["weights"]) == 16
