"""Starts from data: gradients and inputs as plain autograd and torch.linalg give them, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery
from surgery.cli import main
from surgery.runtime import calibrate
from tests.models import ARCHITECTURES, Architecture
from tests.project import save_project

pytestmark = pytest.mark.usefixtures("captured_once")

METHOD = """
method seen(rank: int = 3) {
    G = frozen grad(W)
    R = frozen right_singular(grad(W), rank)
    V = frozen right_singular(activations(x), rank)
    s = frozen singular_values(activations(x), rank)
    Z = train zeros[out, rank]
    delta = Z @ (R + V)
}
"""


def loss(architecture: Architecture, logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The sum of the task's loss and the number of labels, written out."""
    if architecture.task == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
    return total, int((labels != -100).sum())


def plain(architecture: Architecture, model: Any, batches: list[dict[str, Tensor]], paths: list[str]) -> Any:
    """Gradients of the mean loss by parameter, and the inputs of modules, by autograd and hooks on the model itself."""
    rows: dict[str, list[Tensor]] = {path: [] for path in paths}

    def keep(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: rows[path].append(arguments[0].detach().flatten(0, -2))

    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(keep(path))
    total, count = torch.zeros(()), 0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        part, labels = loss(architecture, model(**inputs).logits, batch["labels"])
        total, count = total + part, count + labels
    torch.autograd.backward(total / count)
    return {name: value.grad for name, value in model.named_parameters()}, {k: torch.cat(v) for k, v in rows.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert", "t5"])
def test_what_is_seen_equals_plain_autograd(family: str) -> None:
    chosen = ARCHITECTURES[family]
    model = chosen.model(dropout=0.1).double()  # evaluation mode: no dropout, here and there
    batches = [{**chosen.inputs(rows), "labels": chosen.labels(rows)} for rows in (3, 5)]
    if chosen.task == "causal_lm":
        batches[0]["labels"][:, 4:] = -100  # the mean is over all labels, not over batches
    step = surgery.compile(surgery.parse(METHOD + chosen.spec("seen()")), model, calibration=batches)
    gradients, rows = plain(chosen, model, batches, [site.path for site in step.plan.sites])
    for site in step.plan.sites:
        own = step.parameters_by_site[site.path]
        gradient = gradients[site.parameter].T if site.transposed else gradients[site.parameter]
        assert own["G"].dtype == torch.float64
        torch.testing.assert_close(own["G"], gradient, rtol=1e-9, atol=1e-14)
        assert float(own["G"].abs().max()) > 0
        for matrix, name in ((gradient, "R"), (rows[site.path], "V")):
            right = torch.linalg.svd(matrix, full_matrices=False).Vh[:3]
            torch.testing.assert_close(own[name].abs(), right.abs(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(own["s"], torch.linalg.svdvals(rows[site.path])[:3], rtol=1e-8, atol=0)


class Twice(nn.Module):
    """One Linear layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, 6]` to the same."""
        found: Tensor = self.shared(torch.tanh(self.shared(x)))
        return found


STEP = "adapt shared { with seen() }\nstep { loss = mse  optimizer = sgd(lr = 0.1)  steps = 2 }"


def twice(rows: int = 5) -> tuple[Any, dict[str, Tensor]]:
    """The model and a batch for it."""
    generator = torch.Generator().manual_seed(rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Twice()
    return model, {name: torch.randn(rows, 6, generator=generator) for name in ("x", "labels")}


def test_every_use_of_a_weight_counts() -> None:
    model, batch = twice()
    step = surgery.compile(surgery.parse(METHOD + STEP), model, {"x": batch["x"]}, calibration=[batch])
    torch.autograd.backward(F.mse_loss(model(batch["x"]), batch["labels"]))
    found = step.parameters_by_site["shared"]
    torch.testing.assert_close(found["G"], model.shared.weight.grad)
    rows = torch.cat([batch["x"], torch.tanh(model.shared(batch["x"]))]).detach()
    torch.testing.assert_close(found["s"], torch.linalg.svdvals(rows)[:3])


def test_padding_is_not_looked_at() -> None:
    chosen = ARCHITECTURES["bert"]
    batch = {**chosen.inputs(4), "labels": chosen.labels(4)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    longer = {**batch, "input_ids": F.pad(batch["input_ids"], (0, 5), value=7),
              "attention_mask": F.pad(batch["attention_mask"], (0, 5))}  # fmt: skip
    program = surgery.parse(METHOD + chosen.spec("seen()"))
    first, second = (surgery.compile(program, chosen.model().double(), calibration=[b]) for b in (batch, longer))
    for site in first.plan.sites:
        ours, theirs = first.parameters_by_site[site.path], second.parameters_by_site[site.path]
        torch.testing.assert_close(ours["s"], theirs["s"])
        torch.testing.assert_close(ours["G"], theirs["G"])


def test_there_is_never_more_than_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves: list[Tensor] = []
    alive: list[int] = []
    take = calibrate._take_gradient

    def watched(leaf: Any, path: str, gradients: dict[str, Tensor]) -> None:
        leaves.append(leaf)
        leaf.register_post_accumulate_grad_hook(  # before the one that takes it away
            lambda leaf: alive.append(sum(other.grad is not None for other in leaves))
        )
        take(leaf, path, gradients)

    monkeypatch.setattr(calibrate, "_take_gradient", watched)
    chosen = ARCHITECTURES["gpt2"]
    model = chosen.model()
    batches = [{**chosen.inputs(rows), "labels": chosen.labels(rows)} for rows in (3, 5)]
    step = surgery.compile(surgery.parse(METHOD + chosen.spec("seen()")), model, calibration=batches)
    assert len(leaves) == len(step.plan.sites) == 8
    assert alive == [1] * 16  # each weight once per batch, the ones before it gone
    assert all(leaf.grad is None for leaf in leaves)
    learned = [name for name, value in model.named_parameters() if value.grad is not None]
    assert not learned


def state(model: Any) -> Any:
    """What of a model calibration must leave as it was."""
    return (
        [(name, value.requires_grad, value.grad, value._version) for name, value in model.named_parameters()],
        [(name, module.training) for name, module in model.named_modules()],
        model.config.to_dict(),
    )


def test_the_model_stays_as_it_is() -> None:
    chosen = ARCHITECTURES["llama"]
    model = chosen.model().train()
    model.get_parameter("lm_head.weight").requires_grad_(False)
    before = state(model)
    good = {**chosen.inputs(3), "labels": chosen.labels(3)}
    program = surgery.parse(METHOD + chosen.spec("seen()"))
    surgery.compile(program, model, calibration=[good])
    assert state(model) == before
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[0] = torch.nan
    before = state(model)
    with pytest.raises(surgery.SurgError, match="SURG053"):
        surgery.compile(program, model, calibration=[good])
    assert state(model) == before


def test_what_is_missing_is_said() -> None:
    model, batch = twice()
    program = surgery.parse(METHOD + STEP)
    plan = surgery.plan(program, model)  # needs no data
    assert plan.sites[0].facts.needs_calibration
    nothing: list[dict[str, Tensor]] = []
    for given in (None, nothing):
        with pytest.raises(surgery.SurgError, match="SURG036.*grad") as raised:
            surgery.compile(program, model, {"x": batch["x"]}, calibration=given)
        (found,) = raised.value.diagnostics
        assert found.span is not None and found.span.text == "grad(W)" and "calibrate = 128" in (found.help or "")
    with pytest.raises(surgery.SurgError, match="SURG036"):
        surgery.apply(program, model)
    with pytest.raises(surgery.SurgError, match="SURG053"):
        broken = {**batch, "labels": batch["labels"] * torch.inf}
        surgery.compile(program, model, {"x": batch["x"]}, calibration=[broken])


def test_a_weight_that_the_loss_does_not_depend_on_has_no_gradient() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.before(x).detach())
            return found

    method = "method m() { A = train zeros[out, 2]  B = train right_singular(grad(W), 2)  delta = A @ B }\n"
    program = surgery.parse(method + "adapt before { with m() }\nstep { loss = mse  batch = 2  steps = 1 }")
    batch = {"x": torch.randn(2, 6), "labels": torch.randn(2, 3)}
    with pytest.raises(surgery.SurgError, match="SURG036.*`before`"):
        surgery.compile(program, Cut(), {"x": batch["x"]}, calibration=[batch])


def test_the_inputs_of_an_embedding_are_no_rows() -> None:
    chosen = ARCHITECTURES["llama"]
    text = "method m() { A = train right_singular(activations(x), 2)  B = train zeros[out, 2]  delta = B @ A }\n"
    spec = f'model "given" {{ task = causal_lm }}\n{text}adapt model.embed_tokens {{ with m() }}\nstep {{ steps = 1 }}'
    batch = {**chosen.inputs(3), "labels": chosen.labels(3)}
    with pytest.raises(surgery.SurgError, match=r"SURG036.*model.embed_tokens"):
        surgery.compile(surgery.parse(spec), chosen.model(tie_word_embeddings=False), calibration=[batch])


def test_a_saved_run_needs_no_data(tmp_path: Path) -> None:
    model, batch = twice()
    step = surgery.compile(surgery.parse(METHOD + STEP), model, {"x": batch["x"]}, calibration=[batch])
    step(batch)
    step.save(tmp_path / "run")
    again = surgery.load(tmp_path / "run", twice()[0], example_inputs={"x": batch["x"]})
    assert all(torch.equal(again.weights[name], value) for name, value in step.weights.items())
    adapted = surgery.apply(tmp_path / "run", twice()[0])
    torch.testing.assert_close(adapted(batch["x"]), step.forward(x=batch["x"]))


# --- the command line -------------------------------------------------------------------------------------------------

SPEC = """
model "tiny" { task = sequence_classification(labels = 2) }
adapt **.self.query { with eva(rank = 2) }
step { optimizer = adamw(lr = 1e-2)  batch = 8  steps = 3  seed = 3 }
data "rows.jsonl" { text = "{text}"  label = kind  CALIBRATE }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("project")
    save_project(folder)
    return folder


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--device", "cpu"])
    return int(ended.value.code or 0)


def starts(folder: Path, name: str, text: str) -> dict[str, Tensor]:
    """The tensors that `surgery compile` writes for a spec."""
    (folder / f"{name}.surg").write_text(text)
    assert run("compile", str(folder / f"{name}.surg"), "-o", str(folder / name)) == 0
    return load_file(folder / name / "adapters.safetensors")


def test_the_data_block_calibrates(folder: Path) -> None:
    whole = starts(folder, "whole", SPEC.replace("CALIBRATE", ""))
    few = starts(folder, "few", SPEC.replace("CALIBRATE", "calibrate = 5"))
    name = "bert.encoder.layer.1.attention.self.query.A"
    assert not torch.allclose(whole[name], few[name], atol=1e-4)
    assert run("train", str(folder / "few.surg"), "-o", str(folder / "run")) == 0
    assert run("train", str(folder / "few"), "-o", str(folder / "other")) == 0  # compiled: the tensors are there
    trained, other = (load_file(folder / run_ / "adapters.safetensors") for run_ in ("run", "other"))
    assert all(torch.equal(trained[key], value) for key, value in other.items())


def test_a_spec_without_data_says_what_it_lacks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bare.surg").write_text(SPEC[: SPEC.index("data")])
    assert run("compile", str(folder / "bare.surg"), "-o", str(folder / "bare")) == 1
    assert "SURG036" in capsys.readouterr().err
    (folder / "zero.surg").write_text(SPEC.replace("CALIBRATE", "calibrate = 0"))
    assert run("compile", str(folder / "zero.surg"), "-o", str(folder / "zero")) == 1
    assert "SURG004" in capsys.readouterr().err
