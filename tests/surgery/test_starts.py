"""Starts that are computed: from W, from other checkpoints, and events at the start; against torch.linalg and peft."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery.compiler.algebra import decompose
from surgery.compiler.graph import tensors
from surgery.compiler.own_graph import rewrite
from surgery.runtime.initialise import initialise
from tests.models import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("captured_once")

STEP = "step { loss = mse  optimizer = sgd(lr = 0.1)  batch = 4  steps = 4  seed = 3 }"


def method(body: str, parameters: str = "rank: int = 3") -> str:
    """A spec for the one Linear of `linear()`, whose method has these tensors and an equation that reads none."""
    return f"method m({parameters}) {{\n{body}\nZ = train zeros[out, in]\ndelta = Z\n}}\nadapt 0 {{ with m() }}\n{STEP}"


def linear(inputs: int = 7, outputs: int = 5, dtype: torch.dtype = torch.float64) -> Any:
    """One Linear layer, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(inputs, outputs)).to(dtype)


def starts(body: str, model: Any = None, folder: Path | None = None) -> dict[str, Tensor]:
    """The starts of the tensors of `body` by name."""
    model = linear() if model is None else model
    step = surgery.compile(surgery.parse(method(body), folder), model, {"input": torch.randn(4, 7).double()})
    return {name.removeprefix("0."): value for name, value in step.weights.items()}


# --- decompositions ---------------------------------------------------------------------------------------------------


def test_singular_vectors_and_values() -> None:
    body = """
        U = frozen left_singular(W, rank)
        s = frozen singular_values(W, rank)
        V = frozen right_singular(W, rank)
        least = frozen right_singular(W, -2)
        SV = frozen diag(singular_values(W, rank)) @ right_singular(W, rank)
        scaled = frozen 0.5 * left_singular(W, rank) * sqrt(singular_values(W, rank))
    """
    model = linear()
    found, w = starts(body, model), model[0].weight.detach()
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(found["s"], values[:3], rtol=1e-12, atol=0)
    torch.testing.assert_close(found["V"].abs(), right[:3].abs(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["least"].abs(), right[-2:].abs(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["U"] @ found["SV"], left[:, :3] * values[:3] @ right[:3], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["scaled"], 0.5 * found["U"] * values[:3].sqrt())
    for name in ("V", "least"):
        largest = found[name].gather(1, found[name].abs().argmax(1, keepdim=True))
        assert bool((largest > 0).all())


def test_the_factors_of_a_qr_decomposition() -> None:
    model = linear()
    found, w = starts("Q = frozen qr_q(W, 5)\nR = frozen qr_r(W, 5)\nq = frozen qr_q(W, 2)", model), model[0].weight
    torch.testing.assert_close(found["Q"] @ found["R"], w.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found["Q"].T @ found["Q"], torch.eye(5).double(), rtol=1e-12, atol=1e-14)
    assert bool((found["R"].diagonal() >= 0).all()) and torch.equal(found["R"], found["R"].triu())
    torch.testing.assert_close(found["q"], found["Q"][:, :2])


def test_singular_calls_on_one_matrix_share_one_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    svd = torch.linalg.svd

    def counted(matrix: Tensor, **settings: Any) -> Any:
        calls.append(tuple(matrix.shape))
        return svd(matrix, **settings)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    starts("""
        U = frozen left_singular(hstack(W, 2 * W), rank)
        s = frozen singular_values(hstack(W, 2 * W), 2)
        V = frozen right_singular(hstack(W, 2 * W), -1)
        other = frozen right_singular(W, rank)
    """)
    assert sorted(calls) == [(5, 7), (5, 14)]


def test_conv1d_weights_are_the_logical_matrix() -> None:
    architecture = ARCHITECTURES["gpt2"]
    model = architecture.model().double()
    text = "method m() { U = frozen left_singular(W, 4)  Z = train zeros[4, in]  delta = U @ Z }\n"
    plan = surgery.plan(surgery.parse(text + architecture.spec("m()")), model)
    found = initialise(plan, tensors(model))
    for site in plan.sites:
        w = model.get_parameter(site.parameter).detach().T
        projector = torch.linalg.svd(w).U[:, :4]
        u = found[f"{site.path}.U"]
        assert u.shape == (site.shape[0], 4)
        torch.testing.assert_close(u @ u.T, projector @ projector.T, rtol=1e-9, atol=1e-11)


def low_rank(rows: int, columns: int, decay: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    values = torch.arange(1, columns + 1, dtype=torch.float64).pow(-decay)
    found: Tensor = left * values @ right
    return found


def test_a_large_matrix_is_decomposed_only_as_far_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not decompose.is_truncated((1023, 4096), 1)
    assert decompose.is_truncated((1024, 4096), 34) and not decompose.is_truncated((1024, 4096), 35)
    assert not decompose.is_truncated((1024, 4096), -4)  # the smallest need all of it
    monkeypatch.setattr(decompose, "LARGE", 512)  # the same rule, for a matrix that a test can afford
    matrix = low_rank(600, 520, decay=1.0)  # values 1, 1/2, 1/3, ...
    assert decompose.is_truncated((600, 520), 4)
    left, values, right = decompose.singular(matrix, 4, seed=5)
    exact = decompose.taken(torch.linalg.svd(matrix, full_matrices=False), 4)
    for ours, theirs in zip((left, values, right), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.manual_seed(9)  # the draw is its own, whatever torch's generator is at
    assert torch.equal(decompose.singular(matrix, 4, seed=5)[0], left)
    flat = torch.randn(600, 520, generator=torch.Generator().manual_seed(2), dtype=torch.float64)  # no gaps at all
    best = torch.linalg.svdvals(flat)[:4].square().sum()
    assert float(decompose.singular(flat, 4)[1].square().sum() / best) > 0.99


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    model = linear()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(surgery.SurgError) as raised:
        starts("U = frozen left_singular(W, rank)", model)
    assert [found.code for found in raised.value.diagnostics] == ["SURG053"]


# --- positions --------------------------------------------------------------------------------------------------------


def test_onehot_rows_and_choice() -> None:
    found = starts("H = frozen onehot_rows[rank, in]\nc = frozen choice(in)[4]\nall = frozen choice(out)[out]")
    assert torch.equal(found["H"].sum(1), torch.ones(3).double()) and float(found["H"].sum(0).max()) == 1
    assert set(found["H"].flatten().tolist()) == {0.0, 1.0}
    assert found["c"].dtype == torch.int64 and len(set(found["c"].tolist())) == 4
    assert sorted(found["all"].tolist()) == list(range(5)) and found["all"].tolist() != list(range(5))
    again = starts("c = frozen choice(in)[4]")
    assert torch.equal(again["c"], found["c"])  # of the name and the seed alone


PICKED = """
method picked(count: int = 2) {
    c = frozen choice(in)[count]
    v = train zeros[out, count]
    delta = v @ select(c, in)
}
adapt 0 { with picked() }
"""


def test_positions_stay_whole_numbers(tmp_path: Path) -> None:
    program = surgery.parse(PICKED + STEP.replace("seed", "adapter_dtype = bfloat16  seed"))
    step = surgery.compile(program, linear(dtype=torch.float32), {"input": torch.randn(4, 7)})
    batch = {"input": torch.randn(4, 7), "labels": torch.randn(4, 5)}
    before = step.weights["0.c"].clone()
    step(batch)
    changed = (step.effective_weight("0") != step.model.get_parameter("0.weight")).any(0)
    assert sorted(changed.nonzero().flatten().tolist()) == sorted(before.tolist())
    step.save(tmp_path / "run")
    assert load_file(tmp_path / "run" / "adapters.safetensors")["0.c"].dtype == torch.int64
    again = surgery.load(tmp_path / "run", linear(dtype=torch.float32), example_inputs={"input": batch["input"]})
    assert again.weights["0.c"].dtype == torch.int64 and torch.equal(again.weights["0.c"], before)
    assert float(again(batch).loss) == float(step(batch).loss)
    adapted = surgery.apply(surgery.parse(PICKED), linear(dtype=torch.float32)).to(torch.bfloat16)
    assert adapted.state_dict()["0.c"].dtype == torch.int64
    assert adapted(batch["input"].bfloat16()).isfinite().all()


# --- other checkpoints ------------------------------------------------------------------------------------------------

TOWARDS = 'D = frozen weight_of("other") - W\nB = frozen left_singular(hstack(weight_of("other"), W), rank)'


def checkpoint(folder: Path, weights: dict[str, Tensor], sharded: bool = False) -> None:
    """A folder with these tensors, in one file or in one each."""
    folder.mkdir()
    if not sharded:
        save_file(weights, folder / "model.safetensors")
        return
    files = {name: f"model-{number:05}.safetensors" for number, name in enumerate(weights)}
    for name, file in files.items():
        save_file({name: weights[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("key", ["0.weight", "base.0.weight", "weight"])
def test_the_weight_of_another_checkpoint(tmp_path: Path, key: str, sharded: bool) -> None:
    model, other = linear(), torch.randn(5, 7, dtype=torch.float64)
    checkpoint(tmp_path / "other", {key: other, "unrelated": torch.zeros(3)}, sharded)
    found, w = starts(TOWARDS, model, tmp_path), model[0].weight.detach()
    torch.testing.assert_close(found["D"], other - w)
    left = torch.linalg.svd(torch.cat([other, w], 1)).U[:, :3]
    torch.testing.assert_close(found["B"] @ found["B"].T, left @ left.T)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"1.weight": torch.zeros(5, 7)}, "has no weight `0.weight`"),
        ({"0.weight": torch.zeros(7, 5)}, "has shape [7, 5], the model has [5, 7]"),
        ({"a.0.weight": torch.zeros(5, 7), "b.0.weight": torch.zeros(5, 7)}, "has no weight `0.weight`"),
        (None, "has no model.safetensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit(tmp_path: Path, weights: dict[str, Tensor] | None, says: str) -> None:
    checkpoint(tmp_path / "other", weights) if weights else (tmp_path / "other").mkdir()
    with pytest.raises(surgery.SurgError) as raised:
        starts(TOWARDS, None, tmp_path)
    (found,) = raised.value.diagnostics
    assert found.code == "SURG037" and says in found.message
    assert found.span is not None and found.span.text == 'weight_of("other")'


def test_a_broken_and_a_missing_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(surgery.SurgError, match="SURG037.*cannot be read"):
        starts(TOWARDS, None, tmp_path)
    with pytest.raises(surgery.SurgError, match="SURG030") as raised:
        starts('D = frozen weight_of("./nowhere")', None, tmp_path)
    assert raised.value.diagnostics[0].span is not None


def test_cora_takes_its_basis_from_two_checkpoints(tmp_path: Path) -> None:
    first, second = torch.randn(5, 7), torch.randn(5, 7)
    checkpoint(tmp_path / "first", {"0.weight": first})
    checkpoint(tmp_path / "second", {"0.weight": second})
    text = f'adapt 0 {{ with cora("first", "second", rank = 2) }}\n{STEP}'
    step = surgery.compile(surgery.parse(text, tmp_path), linear(dtype=torch.float32), {"input": torch.randn(4, 7)})
    left = torch.linalg.svd(torch.cat([first, second], 1)).U[:, :2]
    basis = step.weights["0.B"]
    torch.testing.assert_close(basis @ basis.T, left @ left.T, rtol=1e-4, atol=1e-5)


# --- events at the start ----------------------------------------------------------------------------------------------

RESIDUAL = """
method residual(rank: int = 3, share: real = 1) {
    A = train kaiming_uniform[rank, in]
    B = train kaiming_uniform[out, rank]
    delta = B @ A
    at start { W -= share * delta }
}
"""


# peft decomposes a Conv1D's weight as it is stored, and its OLoRA factors are then of another matrix's sizes.
@pytest.mark.parametrize(("name", "family"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama")])
def test_the_start_equals_peft(name: str, family: str) -> None:
    chosen = ARCHITECTURES[family]
    model = chosen.model()
    targets = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}[family]
    step = surgery.compile(surgery.parse(chosen.spec(f"{name}(rank = 4, alpha = 6)")), model)
    settings: Any = {"init_lora_weights": name, "fan_in_fan_out": family == "gpt2"}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings)
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config)
    assert len(step.plan.sites) == sum(path.endswith("lora_A") for path, _ in theirs.named_modules())
    for site in step.plan.sites:
        layer: Any = theirs.base_model.model.get_submodule(site.path)
        own = step.parameters_by_site[site.path]
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # up to signs
        torch.testing.assert_close((own["B"] @ own["A"]).detach(), delta.detach(), rtol=1e-4, atol=1e-5)
        residual = layer.get_base_layer().weight.detach()
        torch.testing.assert_close(step.weights[site.parameter].detach(), residual, rtol=1e-4, atol=1e-5)
        for key in ("A", "B"):
            reference = getattr(layer, f"lora_{key}")["default"].weight.detach().abs()
            torch.testing.assert_close(own[key].detach().abs(), reference, rtol=1e-3, atol=1e-4)
    inputs = chosen.inputs()
    with torch.no_grad():
        torch.testing.assert_close(step.forward(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_w_is_corrected_in_the_step_alone(family: str, tmp_path: Path) -> None:
    chosen = ARCHITECTURES[family]
    model = chosen.model()
    before = copy.deepcopy(model.state_dict())
    program = surgery.parse(chosen.spec("pissa(rank = 4, alpha = 6)"))
    step = surgery.compile(program, model)
    inputs, batch = chosen.inputs(), {**chosen.inputs(), "labels": chosen.labels()}
    with torch.no_grad():
        torch.testing.assert_close(step.forward(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    for site in step.plan.sites:
        assert site.facts.moves_base and site.facts.identity_at_start and site.update == "none"
        assert not torch.equal(step.weights[site.parameter], before[site.parameter])
        own = before[site.parameter].T if site.transposed else before[site.parameter]
        torch.testing.assert_close(step.effective_weight(site.path), own, rtol=0, atol=1e-6)

    for _ in range(2):
        step(batch)
    step.save(tmp_path / "run")
    saved = load_file(tmp_path / "run" / "adapters.safetensors")
    assert not saved.keys() & {site.parameter for site in step.plan.sites}
    assert {f"{site.path}.{name}" for site in step.plan.sites for name in ("A_at_start", "B_at_start")} <= saved.keys()
    again = surgery.load(tmp_path / "run", chosen.model())
    assert all(torch.equal(again.weights[name], value) for name, value in step.weights.items())
    assert [float(step(batch).loss) for _ in range(3)] == [float(again(batch).loss) for _ in range(3)]

    with torch.no_grad():
        outputs = step.forward(**inputs).logits
        torch.testing.assert_close(step.merge()(**inputs).logits, outputs, rtol=1e-4, atol=1e-5)
        step.save(tmp_path / "run")
        adapted = surgery.apply(tmp_path / "run", chosen.model()).eval()
        torch.testing.assert_close(adapted(**inputs).logits, outputs, rtol=1e-4, atol=1e-5)
        fresh = surgery.apply(program, chosen.model()).eval()
        torch.testing.assert_close(fresh(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_untied_head_is_corrected_alone(tmp_path: Path) -> None:
    chosen = ARCHITECTURES["qwen2"]
    model = chosen.model()
    rule = "adapt lm_head { with residual()  untie }\nstep { steps = 4 }"
    text = f'model "given" {{ task = causal_lm }}\n{RESIDUAL}{rule}'
    step = surgery.compile(surgery.parse(text), model)
    assert torch.equal(step.weights["model.embed_tokens.weight"], model.get_parameter("model.embed_tokens.weight"))
    assert not torch.equal(step.weights["lm_head.weight"], model.get_parameter("lm_head.weight"))
    with torch.no_grad():
        expected = model(**chosen.inputs()).logits
        torch.testing.assert_close(step.forward(**chosen.inputs()).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_start_event_beside_one_that_moves_w(tmp_path: Path) -> None:
    moving = RESIDUAL.replace("at start", "after step { W += 0.5 * (delta - prev(delta)) }\n    at start")
    text = f"{moving}adapt 0 {{ with residual()  update = literal }}\n{STEP}"
    inputs = {"input": torch.randn(4, 7)}
    step = surgery.compile(surgery.parse(text), linear(dtype=torch.float32), inputs)
    batch = {**inputs, "labels": torch.randn(4, 5)}
    corrected = step.weights["0.weight"].clone()
    start = step.weights["0.B"] @ step.weights["0.A"]
    step(batch)
    moved = corrected + 0.5 * (step.weights["0.B"] @ step.weights["0.A"] - start)
    torch.testing.assert_close(step.weights["0.weight"], moved)
    step.save(tmp_path / "run")
    again = surgery.load(tmp_path / "run", linear(dtype=torch.float32), example_inputs=inputs)
    assert torch.equal(again.weights["0.weight"], step.weights["0.weight"])
    adapted = surgery.apply(tmp_path / "run", linear(dtype=torch.float32))
    torch.testing.assert_close(adapted(inputs["input"]), step.forward(**inputs))


@pytest.mark.parametrize(
    ("event", "identity"),
    [
        ("W -= delta", True),
        ("W = W - delta", True),
        ("W -= 2 * delta", False),
        ("W += delta", False),
        ("W = delta", False),
    ],
)
def test_what_a_start_event_leaves_is_proved(event: str, identity: bool) -> None:
    text = RESIDUAL.replace("W -= share * delta", event) + f"adapt 0 {{ with residual() }}\n{STEP}"
    model = linear()
    step = surgery.compile(surgery.parse(text), model, {"input": torch.randn(4, 7).double()})
    w, delta = model[0].weight.detach(), (step.weights["0.B"] @ step.weights["0.A"]).detach()
    expected = {"W -= 2 * delta": w - delta, "W += delta": w + 2 * delta, "W = delta": 2 * delta}.get(event, w)
    torch.testing.assert_close(step.effective_weight("0"), expected)
    assert step.plan.sites[0].facts.identity_at_start is identity
    assert [(entry.phase, entry.update) for entry in step.plan.events] == [("at start", "once")]


def test_bfloat16_weights_may_be_corrected() -> None:
    text = f"adapt 0 {{ with pissa(rank = 2) }}\n{STEP}"
    model = linear(dtype=torch.bfloat16)
    step = surgery.compile(surgery.parse(text), model, {"input": torch.randn(4, 7).bfloat16()})
    torch.testing.assert_close(step.effective_weight("0"), model[0].weight.detach().float(), rtol=0, atol=2**-10)


def test_a_graph_of_ones_own_is_corrected() -> None:
    model, x = linear(), torch.randn(4, 7).double()
    graph = torch.fx.symbolic_trace(model)
    plan = surgery.plan(surgery.parse(f"adapt 0 {{ with pissa(rank = 2) }}\n{STEP}"), model)
    rewritten = rewrite(graph, plan)
    torch.testing.assert_close(rewritten(x), model(x))
    assert graph.get_parameter("0.weight") is model[0].weight
    with torch.no_grad():
        rewritten.get_parameter("0.B").zero_()
    values = torch.linalg.svdvals(model[0].weight.detach())
    own = rewritten.get_parameter("corrected.0.weight").detach()
    torch.testing.assert_close(torch.linalg.svdvals(own)[:3], values[2:])


def test_two_methods_with_one_event_at_the_start() -> None:
    text = f"adapt 0 {{ with pissa(rank = 2) + lora(rank = 2) }}\n{STEP}"
    model = linear()
    step = surgery.compile(surgery.parse(text), model, {"input": torch.randn(4, 7).double()})
    torch.testing.assert_close(step.effective_weight("0"), model[0].weight.detach())
    with pytest.raises(surgery.SurgError, match="SURG035"):
        surgery.parse(f"adapt 0 {{ with 2 * pissa(rank = 2) }}\n{STEP}")


def test_every_expert_has_its_own_start() -> None:
    chosen = ARCHITECTURES["qwen3_moe"]
    text = """
    method m(rank: int = 3) {
        A = train sqrt(singular_values(W, rank))[:, None] * right_singular(W, rank)
        B = train left_singular(W, rank) * sqrt(singular_values(W, rank))
        c = frozen choice(in)[20]
        x1 = frozen xavier[in]
        delta = B @ A
        at start { W -= delta }
    }
    model "given" { task = causal_lm }
    adapt model.layers.*.mlp.experts.gate_up_proj { with m() }
    """
    model = chosen.model()
    step = surgery.compile(surgery.parse(text), model)
    for site in step.plan.sites:
        own, w = step.parameters_by_site[site.path], model.get_parameter(site.parameter).detach()
        assert own["c"].shape == (4, 20) and all(len(set(row.tolist())) == 20 for row in own["c"])
        assert not torch.equal(own["c"][0], own["c"][1])
        for number in range(4):
            left, values, right = torch.linalg.svd(w[number], full_matrices=False)
            best = left[:, :3] * values[:3] @ right[:3]
            torch.testing.assert_close((own["B"] @ own["A"])[number].detach(), best, rtol=1e-4, atol=1e-5)
            residual = step.weights[site.parameter][number].detach()
            torch.testing.assert_close(residual, w[number] - best, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = model(**chosen.inputs()).logits
        torch.testing.assert_close(step.forward(**chosen.inputs()).logits, expected, rtol=1e-4, atol=1e-5)
