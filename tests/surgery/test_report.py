"""The report of a run: its figures against dense float64 algebra, and its page as a browser reads it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.compiler.algebra.base import logical
from surgery.compiler.diagnostics import SurgError
from surgery.compiler.plan import Site
from surgery.runtime.best import Best
from surgery.runtime.report import changes as module
from surgery.runtime.report import svg
from surgery.runtime.report.changes import Change, changes, changes_alone, effective_rank, reached, spectrum_of_product
from surgery.runtime.report.gather import gather
from surgery.runtime.report.markup import tag, text
from surgery.runtime.report.metrics import Series, read_series
from surgery.runtime.report.page import charts, page
from tests.command_line import cli, succeed
from tests.project import save_project

pytestmark = pytest.mark.usefixtures("captured_once")

SPEC = """# <script>alert("spec")</script> & more
model "tiny" { task = sequence_classification(labels = 2) }

adapt **.self.{query,value} { with lora(rank = 2)  expect 4 }

adapt **.intermediate.dense { with dora(rank = 2) }

train classifier

step { optimizer = adamw(lr = 1e-2)  batch = 8  steps = 6  seed = 3  evaluate = every(3)  compile = off }

data "rows.jsonl" { text = "{text}"  label = kind  holdout = 0.25 }
"""
VOID = {"meta", "path", "rect", "circle", "line"}


# --- figures ----------------------------------------------------------------------------------------------------------


def dense(delta: Tensor) -> tuple[float, float, float]:
    """Norm, effective rank and largest singular value of a matrix, as they are defined."""
    values = torch.linalg.svdvals(delta)
    shares = [float(value) for value in values / values.sum() if value > 0]
    rank = math.exp(-sum(share * math.log(share) for share in shares)) if values.any() else 0.0
    return float((delta**2).sum().sqrt()), rank, float(values[0])


@pytest.mark.parametrize("shape", [(), (3,)])
def test_singular_values_of_a_product_are_those_of_the_matrix(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(*shape, 40, 5, dtype=torch.float64), torch.randn(*shape, 5, 23, dtype=torch.float64)
    expected = torch.linalg.svdvals(left @ right)
    torch.testing.assert_close(spectrum_of_product(left, right), expected[..., :5], rtol=1e-12, atol=1e-12)


def test_effective_rank_counts_directions() -> None:
    values = torch.tensor([[2.0, 2.0, 2.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(effective_rank(values), torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))


def measured(case: Any) -> tuple[list[Change], dict[str, Tensor]]:
    case.disturb()
    for seed in range(4):
        case.step(case.batch(seed))
    saved = {name: tensor.clone() for name, tensor in case.step.state_dict()["weights"].items()}
    return changes(reached(case.step.plan, case.model, saved, case.step.step)), saved


def change_of(case: Any, site: Site) -> Tensor | None:
    try:
        effective = case.step.effective_weight(site.path)
    except SurgError:
        return None
    delta: Tensor = effective - logical(case.model.get_parameter(site.parameter).detach(), site)
    return delta


def test_every_method_against_dense_algebra(mlp: Any) -> None:
    found, saved = measured(mlp)
    alone = changes_alone(mlp.step.plan, saved, mlp.step.step)
    assert [change.path for change in found] == [change.path for change in alone]
    for site, change, without in zip(mlp.step.plan.sites, found, alone, strict=True):
        delta = change_of(mlp, site) if site.parameter else None
        if delta is None:
            assert change.norm is None and change.note
            continue
        norm, rank, largest = dense(delta)
        size = float(logical(mlp.model.get_parameter(site.parameter).detach(), site).norm())
        assert change.norm == pytest.approx(norm, rel=1e-7, abs=1e-12)
        assert change.relative == pytest.approx(norm / size, rel=1e-7, abs=1e-12)
        assert change.largest == pytest.approx(largest, rel=1e-7, abs=1e-12)
        if norm > 1e-9:
            assert change.effective_rank == pytest.approx(rank, rel=1e-6)
        assert without.relative is None and (without.note or without.norm == pytest.approx(norm, rel=1e-7))


def test_what_is_too_large_for_all_singular_values(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    delta = torch.randn(500, 400, dtype=torch.float64)  # noise, whose largest singular values are close to each other
    monkeypatch.setattr(module, "DENSE", 8)
    place = Change("a", "a", "", None, 0, (500, 400))
    found = module._measured(place, delta, 2.0)
    norm, _, largest = dense(delta)
    assert found.norm == pytest.approx(norm) and found.relative == pytest.approx(norm / 2)
    assert found.largest == pytest.approx(largest) and found.effective_rank is None
    assert "not computed" in found.note
    diagonal = module._measured(place, torch.diag_embed(torch.tensor([3.0, -4.0, 0.0] * 4).double()), 2.0)
    assert (diagonal.norm, diagonal.largest) == (10.0, 4.0) and diagonal.effective_rank is not None


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with `runs/whole`, trained to the end, and `runs/start`, compiled alone."""
    folder = tmp_path_factory.mktemp("project")
    save_project(folder)
    (folder / "spec.surg").write_text(SPEC)
    for verb, name in (("train", "whole"), ("compile", "start")):
        succeed(verb, str(folder / "spec.surg"), "-o", str(folder / "runs" / name), "--device", "cpu")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, in a copy of its project."""
    shutil.copytree(made, tmp_path / "project")
    return tmp_path / "project" / "runs" / "whole"


class Outline(HTMLParser):
    """Elements of a page, checked to be closed in order; what it says, and its headings and classes as an outline."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.said: list[str] = []
        self.outline: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs
        if tag not in VOID - {"rect", "circle"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3", "th", "summary"):
            self.outline.append(f"{self.open[-1]} {data}")

    @property
    def text(self) -> str:
        return "".join(self.said)


def assert_harmless(found: Outline) -> None:
    assert not found.names & {"script", "img", "iframe", "link", "object", "a", "b2"}
    for name, value in found.attributes:
        assert not name.startswith("on") and name not in ("src", "href", "style"), (name, value)


def test_a_run_end_to_end(run: Path, capsys: pytest.CaptureFixture[str], golden: Any) -> None:
    code, out, err = cli(capsys, "report", str(run))
    assert code == 0 and "report.html: 6 steps, 8 weights" in out, err
    found = Outline((run / "report.html").read_text(encoding="utf-8"))
    assert_harmless(found)
    assert "http" not in (run / "report.html").read_text().replace("http-equiv", "")
    assert "finished: step 6 of 6" in found.text and SPEC.rstrip() in found.text
    drawn = found.outline[
        found.outline.index("h2 Training") + 1 : found.outline.index("h2 Change of the weights, after step 6")
    ]
    assert len(drawn) == len(charts(gather(run).series)) and drawn[:3] == [
        "h3 Loss",
        "h3 Learning rate",
        "h3 Seconds per step",
    ]
    golden("\n".join(line for line in found.outline if line not in drawn) + "\n", "golden/report_outline.txt")


def test_figures_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = cli(capsys, "report", str(run), "--format", "json")
    found = json.loads(out)
    assert code == 0 and found["finished"] and found["page"] is None and not (run / "report.html").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["metrics"]["loss"] == {"steps": list(range(6)), "values": [row["loss"] for row in rows]}
    assert found["metrics"]["eval_loss"]["steps"] == [2, 5]
    assert [change["layer"] for change in found["changes"]] == [0, 0, 1, 1, 0, 1, None, None]
    assert all(change["norm"] > 0 for change in found["changes"])
    for change in found["changes"][:4]:
        assert 1 <= change["effective_rank"] <= 2 and change["largest"] <= change["norm"] * (1 + 1e-12)


def test_a_run_before_its_first_step(made: Path) -> None:
    report = gather(made / "runs" / "start")
    found = Outline(page(report))
    assert "not finished: step 0 of 6" in found.text and "No step has written" in found.text
    assert all(change.norm == pytest.approx(0, abs=1e-6) for change in report.changes)
    assert all(change.effective_rank == 0 for change in report.changes if "self" in change.path)


def test_a_run_that_died_between_two_saves(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 0.5, "lr": 0.1, "seconds": 0.1}\n{"step": 7, "lo')
    report = gather(run)
    assert report.logged == 7 and "7 steps wrote their numbers down" in Outline(page(report)).text


def test_a_run_that_ended_early(run: Path) -> None:
    best = Best("loss", patience=2, value=0.5, steps=3, since=2)
    report = replace(gather(run), step=5, best=best)
    said = Outline(page(report)).text
    assert "finished: step 5 of 6, ended early: 2 evaluations in a row were no better" in said
    assert "best held-out loss: 0.5, after step 3" in said and report.as_dict()["best"]["value"] == 0.5


def test_without_evaluation_and_with_numbers_that_are_none(run: Path) -> None:
    rows = [{"step": step, "loss": math.nan if step else 1.0, "taken": True, "note": "x"} for step in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = gather(run)
    assert list(report.series) == ["loss"]
    Outline(page(report))


def test_without_the_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {change.path: change for change in gather(run).changes}
    shutil.rmtree(run.parents[1] / "tiny")
    code, out, _ = cli(capsys, "report", str(run))
    assert code == 0 and "without the model's own weights" in out
    report = gather(run)
    for change in report.changes:
        if "self" in change.path:  # LoRA's delta does not read W
            assert change.relative is None and change.norm == pytest.approx(before[change.path].norm)
            assert change.effective_rank == pytest.approx(before[change.path].effective_rank)
        else:  # DoRA's does, and a parameter has no delta of its own
            assert change.norm is None and "own weight" in change.note
    found = Outline((run / "report.html").read_text())
    assert "nothing is relative to them" in found.text and "h3 ‖ΔW‖" in found.outline


def test_another_model_in_its_place(run: Path) -> None:
    config = run.parents[1] / "tiny" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    report = gather(run)
    assert "not the one that the run was begun with" in report.unreached


@pytest.mark.parametrize("name", ["plan.json", "training.json", "adapters.safetensors"])
def test_a_damaged_run_is_an_error(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / name).write_bytes(b"\xff{")
    code, _, err = cli(capsys, "report", str(run))
    assert code == 1 and "SURG054" in err and not (run / "report.html").exists()


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "a"}', "null", "\xff"])
def test_damaged_metrics_are_an_error(run: Path, line: str) -> None:
    (run / "metrics.jsonl").write_text(f'{{"step": 0, "loss": 1}}\n{line}\n', encoding="latin-1")
    with pytest.raises(SurgError, match=r"SURG054.*line 2"):
        gather(run)


def test_nothing_of_the_users_is_markup(run: Path, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\"'></title></style></pre></svg><script>alert(2)</script>\x00"
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, evil: 1.0 * step, "many": {evil + str(n): n for n in range(9)}}) + "\n"
                for step in range(3))
    )  # fmt: skip
    named = tmp_path / "project" / "runs" / "<script>alert(3)<"
    run.rename(named)
    plan = json.loads((named / "plan.json").read_bytes())
    plan["sites"][0]["reason"] = plan["sites"][1]["facts"]["merge_reason"] = plan["file"] = evil
    plan["spec"] = plan["spec"].replace("more", evil[:-1])
    (named / "plan.json").write_text(json.dumps(plan))
    found = Outline(page(gather(named)))
    assert_harmless(found)
    assert evil[:-1] in found.text


def test_text_that_no_markup_can_hold() -> None:
    assert text("a\x00\x1b\ud800<") == "a\ufffd\ufffd\ufffd&lt;"
    assert tag("p", "<", tag("b", '"'), class_='"x') == '<p class="&quot;x">&lt;<b>&quot;</b></p>'


# --- plots ------------------------------------------------------------------------------------------------------------


def test_objects_of_numbers_are_series_of_one_plot(tmp_path: Path) -> None:
    rows = [{"step": step, "rank": {"a": step, "b": 4}, "loss": 1, "eval_loss": 2, "eval_f1": 3} for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = read_series(tmp_path)
    assert series["rank/a"] == Series("rank/a", (0, 1, 2, 3), (0.0, 1.0, 2.0, 3.0))
    names = [(name, [one.name for one in members]) for name, members in charts(series)]
    assert names == [("rank", ["rank/a", "rank/b"]), ("loss", ["loss", "eval_loss"]), ("eval_f1", ["eval_f1"])]
    assert read_series(tmp_path / "none") == {}


def test_thinned_lines_keep_their_extremes() -> None:
    points = [(step, math.sin(step / 50)) for step in range(10_000)]
    points[4321] = (4321, 9.0)
    points[77] = (77, -9.0)
    kept = svg.thinned(points)
    assert len(kept) <= svg.POINTS and {points[4321], points[77]} <= set(kept) and kept == sorted(kept)


def test_running_mean_of_noise_alone() -> None:
    assert svg.running_mean([(step, 1 - step / 100) for step in range(100)]) == []
    noise = [(step, float(step % 2)) for step in range(100)]
    mean = svg.running_mean(noise)
    assert len(mean) == 100 and mean[-1][1] == pytest.approx(0.5, abs=0.11)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 1e-3), (1e-9, 2e-9), (5, 5e6), (0.8, 2.1)])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_ticks_are_few_and_on_the_axis(low: float, high: float, logarithmic: bool) -> None:
    if logarithmic and low <= 0:
        return
    axis = svg.Axis(low, high, 0, 100, logarithmic)
    ticks = axis.ticks(4)
    assert 2 <= len(ticks) <= 9 and ticks == sorted(ticks)
    assert all(-0.01 <= axis(value) <= 100.01 for value in ticks)


@pytest.mark.parametrize("values", [(1.0,), (0.0, 0.0, 0.0), (-2.0, -2.0), (1e9, 1e-9), (math.inf, 1.0), (math.nan,)])
def test_every_series_can_be_drawn(values: tuple[float, ...]) -> None:
    drawn = svg.line_chart("t", [Series("a", tuple(range(len(values))), values)], 1)
    Outline(drawn)
    assert "nan" not in drawn.replace('aria-label="t: a ends at nan"', "") and '"inf' not in drawn
