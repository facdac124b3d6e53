"""`surgery rank --group`: products of weights, the theorem's bound and what reaches it, and what is no product."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.command_line import cli
from tests.comparisons import codes, low_rank, noise, rank, refused, saved


@pytest.fixture
def llama(architectures: Any) -> Callable[..., nn.Module]:
    """A llama of two layers, or of as many as one says."""
    made: Callable[..., nn.Module] = architectures["llama"].model
    return made


def linears(folder: Path, widths: list[int], seed: int) -> Path:
    """A checkpoint of linear layers with nothing in between."""
    pairs = enumerate(zip(widths, widths[1:], strict=False))
    weights = {f"layers.{at}.weight": noise(out, into, seed=seed + at) for at, (into, out) in pairs}
    save_file(weights | {"norm.weight": torch.ones(3)}, folder)
    return folder


def test_a_deep_model_reaches_a_shallow_one_by_the_theorem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = linears(tmp_path / "deep.safetensors", [7] * 7, 0)
    shallow = linears(tmp_path / "shallow.safetensors", [7] * 3, 50)
    products = ["layers.2 @ layers.1 @ layers.0 = layers.0", "layers.5 @ layers.4 @ layers.3 = layers.1"]
    options = [word for product in products for word in ("--group", product)]
    frozen, wished = load_file(deep), load_file(shallow)
    values = []
    for at in range(2):
        first, second, third = (frozen[f"layers.{3 * at + step}.weight"] for step in range(3))
        values.append(torch.linalg.svdvals(wished[f"layers.{at}.weight"] - third @ second @ first))
    for number in (1, 2, 3):
        found = rank(capsys, deep, shallow, *options, "--rank", number)["groups"]
        for row, spectrum in zip(found.values(), values, strict=True):
            bound = float((*spectrum, 0.0)[min(3 * number, 7)])
            assert row["error"] == pytest.approx(bound, rel=1e-9, abs=1e-12)
            assert row["reached"] == pytest.approx(bound, rel=1e-7, abs=1e-8) and row["attained"]
            assert (row["layers"], row["rank"], row["exact"]) == (3, 7, 3)
    found = rank(capsys, deep, shallow, *options, "--tolerance", 0.1)["groups"]
    for row, spectrum in zip(found.values(), values, strict=True):
        assert row["suffices"] == -(-int((spectrum > 0.1 * spectrum[0]).sum()) // 3)


def test_groups_by_patterns_transposed_factors_and_their_adapters(
    llama: Callable[..., nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = llama(num_key_value_heads=4).double()  # so that all four projections are square
    target = copy.deepcopy(base)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(target.named_parameters()):
            if "self_attn" in name:
                parameter.add_(low_rank(parameter, 2, seed))
    folders = saved(base, tmp_path / "base"), saved(target, tmp_path / "target")
    groups = ["--group", "**.o_proj @ **.v_proj", "--group", "**.k_proj.T @ **.q_proj"]
    found = rank(capsys, *folders, *groups, "--adapters", tmp_path / "adapter", "--dtype", "float64", "--rank", 1)
    at = "model.layers.{}.self_attn"
    assert list(found["groups"]) == [
        *(f"{at.format(layer)}.o_proj @ {at.format(layer)}.v_proj" for layer in (0, 1)),
        *(f"{at.format(layer)}.k_proj.T @ {at.format(layer)}.q_proj" for layer in (0, 1)),
    ]
    assert not any("self_attn" in name for name in found["weights"])  # a weight is in one row
    adapted: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload()
    for layer in (0, 1):
        mine, wished, own = (
            {part: model.get_parameter(f"{at.format(layer)}.{part}_proj.weight").detach() for part in "qkvo"}
            for model in (adapted, target, base)
        )
        assert all(torch.linalg.matrix_rank(mine[part] - own[part], tol=1e-9) == 1 for part in "qkvo")
        for name, reached in (("o_proj", [m["o"] @ m["v"] for m in (mine, wished, own)]),
                              ("k_proj.T", [m["k"].mT @ m["q"] for m in (mine, wished, own)])):  # fmt: skip
            row = next(row for key, row in found["groups"].items() if key.startswith(f"{at.format(layer)}.{name}"))
            assert row["rank"] == 4 and row["exact"] == 2
            bound = torch.linalg.svdvals(reached[1] - reached[2])[2]
            assert float(torch.linalg.matrix_norm(reached[1] - reached[0], 2)) == pytest.approx(float(bound), rel=1e-6)
            assert row["error"] == pytest.approx(float(bound), rel=1e-9)


def test_a_group_that_is_narrow_inside_has_a_bound_that_is_not_attained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = linears(tmp_path / "a.safetensors", [9, 3, 9], 0)
    target = linears(tmp_path / "b.safetensors", [9, 3, 9], 50)
    product = ["--group", "layers.1 @ layers.0"]
    (row,) = rank(capsys, base, target, *product, "--rank", 1)["groups"].values()
    assert not row["attained"] and row["size"] > row["reached"] > row["error"] > 0
    code, out, _ = cli(capsys, "rank", str(base), str(target), *product, "--rank", "1", "--device", "cpu")
    assert not code and "not attained" in out
    (row,) = rank(capsys, base, target, *product, "--rank", 3)["groups"].values()
    assert row["attained"] and row["reached"] < 1e-9  # by the changes of the weights themselves


@pytest.mark.parametrize("keys", [4, 2])
def test_the_heads_of_an_attention(
    keys: int, llama: Callable[..., nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = llama(num_key_value_heads=keys).double()
    target = copy.deepcopy(base)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(target.named_parameters()):
            if "v_proj" in name or "o_proj" in name:
                parameter.add_(low_rank(parameter, 2, seed))
    folders = saved(base, tmp_path / "base"), saved(target, tmp_path / "target")
    options = ["--group", "**.o_proj @ **.v_proj", "--per-head", "--dtype", "float64"]
    rows = [
        rank(capsys, *folders, *options, "--rank", number, "--adapters", tmp_path / str(number)) for number in (1, 2)
    ]
    assert codes(rows[0]) == ["SURG075"] * 2 and not codes(rows[1])
    path = "model.layers.{}.self_attn"
    for layer, number in ((0, 1), (1, 1), (0, 2), (1, 2)):
        name = path.format(layer)
        row = rows[number - 1]["groups"][f"{name}.o_proj @ {name}.v_proj"]
        adapter = tmp_path / str(number)
        made: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).merge_and_unload()
        spectra, missed = [], []
        for head in range(4):
            at, served = slice(8 * head, 8 * head + 8), head // (4 // keys)
            own, wished, now = (
                model.get_parameter(f"{name}.o_proj.weight").detach()[:, at]
                @ model.get_parameter(f"{name}.v_proj.weight").detach()[8 * served : 8 * served + 8]
                for model in (base, target, made)
            )
            spectra.append(torch.linalg.svdvals(wished - own))
            missed.append(float(torch.linalg.matrix_norm(wished - now, 2)))
        assert row["rank"] == 4 and row["exact"] == 2
        bound = max(float(values[2 * number]) for values in spectra)
        assert row["error"] == pytest.approx(bound, rel=1e-6, abs=1e-12)
        assert row["reached"] == pytest.approx(max(missed), rel=1e-6, abs=1e-9)
        assert row["attained"] == (number == 2) and row["reached"] >= row["error"] - 1e-9


def test_heads_that_there_are_none_of(
    llama: Callable[..., nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(llama(), tmp_path / "base")
    file, product = base / "model.safetensors", "**.o_proj @ **.v_proj"
    assert refused(capsys, file, file, "--group", product, "--per-head")["code"] == "SURG074"
    same = rank(capsys, base, base, "--group", product, "--per-head")["groups"]
    assert [(row["size"], row["chosen"], row["error"]) for row in same.values()] == [(0, 0, 0)] * 2
    for wrong in ("**.o_proj @ **.k_proj.T @ **.v_proj", "**.down_proj @ **.up_proj.T"):
        assert refused(capsys, base, base, "--group", wrong, "--per-head")["code"] in ("SURG005", "SURG074")


@pytest.mark.parametrize(
    ("product", "code", "column"),
    [
        ("layers.1 @ layer.0", "SURG020", 12),
        ("layers.1 @ = layers.0", "SURG001", 11),
        ("layers.1 = layers.0 = layers.1", "SURG001", 23),
        ("layers.* @ layers.0", "SURG022", 12),
        ("layers.0 @ layers.1", "SURG005", 1),
        ("layers.1 @ layers.0 = layers.0", "SURG005", 1),
        ("layers.0.T @ layers.0", "SURG074", 1),
        ("layers.[x] @ layers.0", "SURG004", 1),
    ],
)
def test_products_that_are_none(
    product: str, code: str, column: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = linears(tmp_path / "a.safetensors", [4, 5, 6], 0)
    found = refused(capsys, base, base, "--group", product)
    assert (found["code"], found["file"], found["line"], found["column"]) == (code, "--group", 1, column)


def test_a_vector_is_no_factor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = linears(tmp_path / "a.safetensors", [4, 5, 6], 0)
    assert refused(capsys, base, base, "--group", "layers.0 @ norm")["code"] == "SURG074"
