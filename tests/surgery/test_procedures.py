"""What happens around the gradient step: events of all kinds, and the procedures of papers that are made of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import surgery
from surgery.cli.plan_text import lists
from surgery.compiler.kernels.across_sites import keep_top, quantile
from surgery.compiler.kernels.active import chosen
from surgery.compiler.kernels.noise import bernoulli, gaussian
from surgery.compiler.kernels.schedules import late_budget
from tests.surgery.three_layers import SITES, ThreeLayers, batch

STEPS = 12
LOW_RANK = "A = train normal(0.5)[rank, in]\nB = train normal(0.5)[out, rank]\ndelta = B @ A\n"


def compiled(rule: str, methods: str = "", optimizer: str = "adamw(lr = 0.05)", settings: str = "") -> Any:
    text = f"{methods}\nadapt * : Linear {{ {rule} }}\n"
    text += f"step {{ optimizer = {optimizer}  loss = mse  batch = 8  steps = {STEPS}  {settings} }}"
    return surgery.compile(surgery.parse(text), model=ThreeLayers(), example_inputs={"x": batch(0)["x"]})


def method(statements: str, tensors: str = LOW_RANK) -> str:
    return f"method m(rank: int = 2) {{\n{tensors}{statements}\n}}"


def copied(step: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in step.state_dict()["weights"].items()}


# --- the language -----------------------------------------------------------------------------------------------------


def test_points_of_a_step_are_in_their_order() -> None:
    """Before the forward, behind the backward before gradients are clipped, after the step with those clipped."""
    states = "".join(f"{name} = state zeros[rank, in]\n" for name in ("first", "raw", "cut"))
    events = """
        before forward { first = A }
        after backward { raw = grad(A) }
        after step     { cut = grad(A) }
    """
    step = compiled("with m()", method(states + events), "sgd(lr = 0.1)", "clip = 0.01")
    for number in range(3):
        before = copied(step)
        norm = float(step(batch(number)).gradient_norm)
        now = copied(step)
        scale = min(0.01 / (norm + 1e-6), 1)
        for path in SITES:
            assert torch.equal(now[f"{path}.first"], before[f"{path}.A"])
            torch.testing.assert_close(now[f"{path}.raw"] * scale, now[f"{path}.cut"], rtol=1e-9, atol=1e-15)
            moved = before[f"{path}.A"] - 0.1 * now[f"{path}.cut"]
            torch.testing.assert_close(now[f"{path}.A"], moved, rtol=1e-9, atol=1e-15)


def test_every_n_steps_is_after_them() -> None:
    step = compiled("with m()", method("n = state zeros[rank]\nevery 4 steps when step > 4 { n += step }"))
    found = []
    for number in range(STEPS):
        step(batch(number))
        found.append(float(step.weights["first.n"][0]))
    assert found == [0] * 7 + [7] * 4 + [18]


def test_means_in_time_are_what_they_say() -> None:
    events = "s = state zeros[rank]\nafter step when step % 2 == 0 { s = 2 * ema(sum(A ** 2, axis = 1), 0.9) + 1 }"
    step = compiled("with m()", method(events))
    mean = torch.zeros(2, dtype=torch.float64)
    for number in range(5):
        step(batch(number))
        if number % 2 == 0:
            mean = 0.9 * mean + 0.1 * step.weights["first.A"].detach().square().sum(1)
        torch.testing.assert_close(step.weights["first.s"], 2 * mean + 1, rtol=1e-12, atol=0.0)


def test_sensitivity_is_that_of_the_paper() -> None:
    step = compiled("with m()", method("s = state zeros[out, rank]\nafter step { s = sensitivity(B, 0.8, 0.7) }"))
    twin = compiled("with m()", method("g = state zeros[out, rank]\nafter step { g = grad(B) }"))
    mean, spread = torch.zeros(8, 2).double(), torch.zeros(8, 2).double()
    for number in range(4):
        step(batch(number))
        twin(batch(number))
        product = (twin.weights["first.B"].detach() * twin.weights["first.g"]).abs()
        mean = 0.8 * mean + (1 - 0.8) * product
        spread = 0.7 * spread + (1 - 0.7) * (product - mean).abs()
        torch.testing.assert_close(step.weights["first.s"], mean * spread, rtol=1e-9, atol=1e-18)


def test_the_largest_over_all_sites_are_kept_exactly() -> None:
    scores = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([[2.0, 2.0], [0.0, 5.0]])]
    kept = [torch.empty_like(score) for score in scores]
    for budget, expected in ((2, [3, 5, 2, 2]), (1.49, [3, 5]), (0, []), (9, [3, 1, 2, 2, 2, 0, 5])):
        keep_top(kept, scores, budget)
        chosen = [float(value) for mask, score in zip(kept, scores, strict=True) for value in score[mask == 1]]
        assert sorted(chosen) == sorted(map(float, expected))
        assert all(set(mask.flatten().tolist()) <= {0.0, 1.0} for mask in kept)
    keep_top(kept, scores, 2)
    assert kept[0].tolist() == [1, 0, 1] and kept[1].tolist() == [[1, 0], [0, 1]], "the first of equal ones"


def test_each_expert_has_the_budget() -> None:
    scores = [torch.rand(3, 4), torch.rand(4)]
    kept = [torch.empty_like(score) for score in scores]
    keep_top(kept, scores, 2, axes=1)
    assert sum(int(mask.sum()) for mask in kept) == 2 * 4


def test_procedures_on_experts() -> None:
    """A stack of three matrices is one site, each of them with the budget, a reset and noise of its own."""
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=3, vocab_size=32, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model, site = MixtralForCausalLM(config), "model.layers.0.mlp.experts.gate_up_proj"
    ids = torch.randint(0, 32, (2, 9))
    for rule in (RULES["adalora"], RULES["flat_lora"], RULES["relora"].replace("5", "2")):
        text = f"adapt model.layers.*.mlp.experts.gate_up_proj {{ with {rule} }}\n"
        text += "step { optimizer = adamw(lr = 0.01)  steps = 6  batch = 2  compile = off }"
        step = surgery.compile(surgery.parse(text), model=model)
        batch_ = {name: ids if name in ("input_ids", "labels") else torch.ones_like(ids) for name in step.graph.inputs}
        for _ in range(6):
            assert torch.isfinite(step(batch_ | {"labels": ids}).loss)
        own = step.parameters_by_site[site]
        if "E" in own:
            left = sum(int(tensors["E"].count_nonzero()) for tensors in step.parameters_by_site.values())
            assert left <= 2 * 3 * 2 and own["kept"].shape == (3, 4)
        elif "gaussian_key" in own:
            assert len(set(own["gaussian_key"].tolist())) == 3
        else:
            assert not torch.equal(own["A"][0], own["A"][1]) and not own["B"].any()


def test_a_quantile_over_all_sites_is_numpy_s() -> None:
    scores = [torch.randn(5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)]
    flat, found = torch.cat([score.flatten() for score in scores]).numpy(), torch.zeros(()).double()
    for share in (0.0, 0.1, 0.5, 0.77, 1.0):
        quantile(found, scores, share)
        assert float(found) == pytest.approx(float(np.quantile(flat, share)), rel=1e-12)


def test_a_threshold_of_the_rule_cuts_at_each_site() -> None:
    """`quantile` compares the sites of its own rule, whatever another rule does with the same method."""
    events = "after step { A = where(relu(abs(A) - quantile(abs(A), 0.75)), A, 0 * A) }"
    text = f"""{method(events)}
        adapt first {{ with m() }}
        adapt {{second,third}} {{ with m() }}
        step {{ optimizer = sgd(lr = 0.1)  loss = mse  batch = 8  steps = 9 }}"""
    step = surgery.compile(surgery.parse(text), model=ThreeLayers(), example_inputs={"x": batch(0)["x"]})
    step(batch(0))
    left = {path: int(step.weights[f"{path}.A"].count_nonzero()) for path in SITES}
    assert left["first"] == 3 and left["second"] + left["third"] == pytest.approx(30 / 4, abs=1)


@pytest.mark.parametrize("optimizer", ["adamw(lr = 0.05)", "sgd(lr = 0.05, momentum = 0.9)"])
def test_a_reset_is_a_start_that_the_optimizer_knows_nothing_of(optimizer: str) -> None:
    """Behind a reset a tensor moves as in a step 0 with those numbers; each reset draws others."""
    step = compiled("with m()", method("every 3 steps { reset A }"), optimizer)
    drawn = [step.weights["first.A"].detach().clone()]
    for number in range(6):
        step(batch(number))
        if number in (2, 5):
            drawn.append(step.weights["first.A"].detach().clone())
            known = {name: step.optimizer.state[step.weights[f"first.{name}"]] for name in "AB"}
            assert not any(bool(value.any()) for value in known["A"].values() if isinstance(value, Tensor))
            assert all(bool(value.any()) for value in known["B"].values() if isinstance(value, Tensor))
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert all(float(one.std()) == pytest.approx(0.5, rel=0.6) for one in drawn)


def test_a_start_from_the_weight_is_computed_again() -> None:
    tensors = "m = train row_norm(W)[out]\nV = W * 1\nweight = diag(m / stop(row_norm(V))) @ V\n"
    step = compiled("with m()", method("every 2 steps { reset m }", tensors))
    for number in range(4):
        step(batch(number))
    expected = torch.linalg.vector_norm(ThreeLayers().first.weight.detach(), dim=1)
    torch.testing.assert_close(step.weights["first.m"].detach(), expected, rtol=1e-12, atol=0.0)


def test_what_reads_the_number_of_steps_needs_it() -> None:
    text = method("after step when step < steps - 1 { A *= 0.9 }")
    text += "adapt * : Linear { with m() }  step { optimizer = sgd(lr = 0.1)  loss = mse }"
    step = surgery.compile(surgery.parse(text), model=ThreeLayers(), example_inputs={"x": batch(0)["x"]})
    with pytest.raises(surgery.SurgError, match="SURG044"):
        step(batch(0))


# --- the procedures ---------------------------------------------------------------------------------------------------

RULES = {
    "adalora": "adalora(rank = 4, target = 2, warmup = 2, cooldown = 3, interval = 2)",
    "sora": "sora(rank = 4, threshold = 0.05, l1 = 0.1)",
    "relora": "relora(rank = 2, period = 5)",
    "xgblora": "xgblora(period = 4, decay = 0.01)",
    "active": "xgblora(period = 4, decay = 0.01)  active = random(2, every = 4)",
    "dora_dynamic": "dora_dynamic(rank = 4, target = 2, interval = 2)",
    "lora2": "lora2(rank = 4, target = 2, width = 4, warmup = 2, cooldown = 3, interval = 2)",
    "flat_lora": "flat_lora(rank = 2, rho = 0.5)",
    "rm_lora": "rm_lora(rank = 4)",
    "delta_lora": "delta_lora(rank = 2, ratio = 0.5, start = 3)  update = literal",
    "delta_lora_scheduled": "delta_lora_scheduled(rank = 2, alpha = 6, ratio = 1.5)",
}


@pytest.mark.parametrize("name", RULES)
def test_a_run_that_was_interrupted_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    """At a step that the name draws; states, masks, redrawn tensors and what the optimizer forgot included."""
    interrupted = sum(map(ord, name)) % (STEPS - 2) + 1
    whole, broken = compiled(f"with {RULES[name]}"), compiled(f"with {RULES[name]}")
    for number in range(STEPS):
        whole(batch(number))
    for number in range(interrupted):
        broken(batch(number))
    broken.save(tmp_path / "run")
    loaded = surgery.load(tmp_path / "run", model=ThreeLayers(), example_inputs={"x": batch(0)["x"]})
    losses = [float(loaded(batch(number)).loss) for number in range(interrupted, STEPS)]
    assert all(map(np.isfinite, losses))
    expected = copied(whole)
    for key, tensor in copied(loaded).items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", RULES)
def test_the_model_that_was_given_never_moves(name: str) -> None:
    model = ThreeLayers()
    before = copy.deepcopy(model.state_dict())
    text = f"adapt * : Linear {{ with {RULES[name]} }}\n"
    text += f"step {{ optimizer = adamw(lr = 0.05)  loss = mse  batch = 8  steps = {STEPS} }}"
    step = surgery.compile(surgery.parse(text), model=model, example_inputs={"x": batch(0)["x"]})
    for number in range(STEPS):
        step(batch(number))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("released", [False, True])
def test_the_gates_of_sora_are_the_exact_prox(released: bool) -> None:
    """argmin (x - z)^2 / 2 + t |x| by search, entry by entry; the released code zeroes all below 2 t."""
    rule = f"with sora(rank = 5, threshold = 0.2, released = {str(released).lower()})"
    step, plain = compiled(rule), compiled("with sora(rank = 5, threshold = 0)")
    step(batch(0))
    plain(batch(0))
    grid = torch.linspace(-4, 4, 800_001, dtype=torch.float64)
    for path in SITES:
        for z, found in zip(plain.weights[f"{path}.g"].tolist(), step.weights[f"{path}.g"].tolist(), strict=True):
            best = float(grid[(0.5 * (grid - z).square() + 0.2 * grid.abs()).argmin()])
            if released and abs(z) < 0.4:
                best = 0.0
            assert found == pytest.approx(best, abs=2e-5)


def test_the_dead_zone_of_the_released_code_is_twice_as_wide() -> None:
    counts = []
    for released in ("false", "true"):
        step = compiled(f"with sora(rank = 5, threshold = 0.5, released = {released})")
        step(batch(0))
        counts.append(sum(int((step.weights[f"{path}.g"] == 0).sum()) for path in SITES))
    assert counts[0] < counts[1]


@pytest.mark.parametrize(("name", "scale", "period"), [("relora", 16 / 2, 5), ("xgblora", 1.0, 4)])
def test_a_change_that_goes_into_the_weight_changes_nothing(name: str, scale: float, period: int) -> None:
    """The function is the same before and behind a merge, and W is the sum of all that was merged."""
    step = compiled(f"with {RULES[name]}")
    inputs, merged = {"x": batch(50)["x"]}, {path: torch.zeros(()) for path in SITES}
    rate = step.optimizer.param_groups[0]
    for number in range(STEPS):
        twin = compiled(f"with {RULES[name]}".replace(f"period = {period}", "period = 1000"))
        if (number + 1) % period == 0:  # a step without its merge
            twin.load_state_dict(copy.deepcopy(step.state_dict()))
            twin(batch(number))
            for path in merged:
                B, A = (twin.weights[f"{path}.{letter}"].detach() for letter in "BA")
                merged[path] = merged[path] + scale * B @ A
        step(batch(number))
        if (number + 1) % period == 0:
            torch.testing.assert_close(step.forward(**inputs), twin.forward(**inputs), rtol=1e-12, atol=1e-12)
            assert not any(step.weights[f"{path}.B"].any() for path in merged)
    assert rate["lr"] == 0.05
    for path, change in merged.items():
        moved = step.weights[f"{path}.weight"].detach() - getattr(ThreeLayers(), path).weight.detach()
        torch.testing.assert_close(moved, change, rtol=1e-10, atol=1e-12)
        boosters = STEPS // period
        assert int(torch.linalg.matrix_rank(moved)) <= boosters * (2 if name == "relora" else 1)


def test_scores_of_dynamic_dora_equal_those_of_the_whole_tensor() -> None:
    """`|c| |b| |a| / |sum c b a|` in closed form, against the `[rank, out, in]` tensor of the released code."""
    step = compiled("with dora_dynamic(rank = 4, target = 2, begin = 0.9, end = 1)")
    mean = {path: torch.zeros(4, dtype=torch.float64) for path in SITES}
    for number in range(6):
        step(batch(number))
        for path in mean:
            t = {name: tensor.detach() for name, tensor in step.parameters_by_site[path].items()}
            whole = torch.einsum("k,ok,ki->koi", t["c"], t["B"], t["A"])
            norms = whole.flatten(1).norm(dim=1) / (whole.sum(0).norm() + 1e-8)
            mean[path] = 0.9 * mean[path] + 0.1 * norms
            torch.testing.assert_close(t["score"], mean[path], rtol=1e-10, atol=1e-12)


def test_dynamic_dora_ends_at_its_mean_rank() -> None:
    assert [late_budget(step, 100, 12, 8, 15, 50) for step in (0, 15, 50, 99)] == [12, 12, 8, 8]
    assert late_budget(40, 100, 12, 8, 15, 50) == pytest.approx(12 - 4 * (25 / 35) ** 3)
    step = compiled(f"with {RULES['dora_dynamic']}")
    for number in range(STEPS):
        step(batch(number))
        if number >= STEPS / 2:
            left = [int(tensors["c"].count_nonzero()) for tensors in step.parameters_by_site.values()]
            assert sum(left) == 2 * 3


def test_lora2_is_scored_by_the_small_matrices_alone() -> None:
    step = compiled(f"with {RULES['lora2']}")
    states = {name.split(".")[1] for name in step.state_dict()["weights"] if "_sensitivity" in name}
    assert states == {"E_sensitivity", "P2_sensitivity", "Q1_sensitivity"}
    for number in range(STEPS):
        step(batch(number))
    assert sum(int(tensors["E"].count_nonzero()) for tensors in step.parameters_by_site.values()) == 2 * 3


def test_the_planes_of_lora2_are_weighed_by_their_product() -> None:
    """The root of the rank where all factors are orthonormal, so this term and `orth` are in balance, not both 0."""
    step = compiled("with lora2(rank = 2, width = 4, orth = 0, cross = 0.3)", optimizer="sgd(lr = 0.1)")
    planes = [t[name] for t in step.parameters_by_site.values() for name in ("P1", "Q1", "P2", "Q2")]
    for number, tensor in enumerate(planes):
        nn.init.orthogonal_(tensor, generator=torch.Generator().manual_seed(number))
    penalties = [float(step(batch(number)).penalty) for number in range(STEPS)]
    assert penalties[0] == pytest.approx(0.3 * 2**0.5, rel=1e-12)
    assert penalties == sorted(penalties, reverse=True)


def test_delta_lora_with_a_scheduled_ratio_does_not_telescope() -> None:
    """The compiler says so, and the literal reading moves W by each step's own ratio."""
    with pytest.raises(surgery.SurgError, match="the ratio is not constant"):
        compiled(f"with {RULES['delta_lora_scheduled']}  update = telescope")
    step = compiled(f"with {RULES['delta_lora_scheduled']}")
    assert {site.update for site in step.plan.sites} == {"literal"}
    (said,) = lists(step.plan)["events"]
    assert said.endswith("(literal: its sum does not telescope, the ratio is not constant)")
    (said,) = lists(compiled(f"with {RULES['delta_lora']}").plan)["events"]
    assert said.endswith("(literal)")
    expected = {path: getattr(ThreeLayers(), path).weight.detach().clone() for path in SITES}
    for number in range(STEPS):
        old = {path: 3 * (t["B"] @ t["A"]).detach() for path, t in step.parameters_by_site.items()}
        step(batch(number))
        ratio = 1.5 * 0.5 * (1 - np.cos(np.pi * number / STEPS))
        for path, t in step.parameters_by_site.items():
            expected[path] += ratio * (3 * (t["B"] @ t["A"]).detach() - old[path])
            torch.testing.assert_close(step.weights[f"{path}.weight"].detach(), expected[path], rtol=1e-12, atol=1e-13)


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_normal_and_depends_on_key_step_and_place() -> None:
    like, key = torch.zeros(()), torch.tensor(2**61 + 12345)
    noise = [gaussian(like, key + shift, step, [400, 500]).flatten() for shift, step in ((0, 3), (0, 4), (1, 3))]
    for one in noise:
        assert float(one.mean()) == pytest.approx(0, abs=0.01) and float(one.var()) == pytest.approx(1, rel=0.02)
        assert float((one**4).mean()) == pytest.approx(3, rel=0.05)
    pairs = torch.corrcoef(torch.stack([*noise, noise[0].roll(1), noise[0].roll(500)]))
    assert float((pairs - torch.eye(5)).abs().max()) < 0.015
    assert not torch.equal(noise[0].sort().values, noise[1].sort().values), "not the same numbers in another order"
    again = gaussian(like, key, torch.tensor(3.0, dtype=torch.float64), [400, 500]).flatten()
    assert torch.equal(again, noise[0]), "a number of the step is as good as a tensor of it"
    assert float(bernoulli(like, key, 7, 0.3, [300, 300]).mean()) == pytest.approx(0.3, abs=0.01)


def test_the_noise_of_flat_lora() -> None:
    """sigma of a row is f * rho / sqrt(in) of its norm, f from 0 up; W stays, and evaluation is without noise."""
    rho, model = 0.5, ThreeLayers()
    step = compiled(f"with flat_lora(rank = 2, alpha = 4, rho = {rho})", optimizer="sgd(lr = 0.05)")
    for number in range(STEPS):
        own, leaves = batch(number), {}
        x = own["x"]
        for path in SITES:
            layer, t = getattr(model, path), step.parameters_by_site[path]
            A, B = (t[name].detach().clone().requires_grad_() for name in "AB")
            leaves[path] = (A, B)
            whole = layer.weight.detach() + 2 * B @ A
            share = 0.5 * (1 - np.cos(np.pi * number / STEPS))
            sigma = share * rho / layer.in_features**0.5 * whole.detach().norm(dim=1, keepdim=True)
            noise = gaussian(whole.detach(), t["gaussian_key"], number, list(whole.shape))
            x = x @ (whole + sigma * noise).T + layer.bias.detach()
            x = torch.tanh(x) if path != "third" else x
        loss = (x - own["labels"]).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        random = torch.get_rng_state()
        assert float(step(own).loss) == pytest.approx(float(loss.detach()), rel=1e-10)
        assert torch.equal(random, torch.get_rng_state()), "torch's own generator is left alone"
        for path, (A, B) in leaves.items():
            assert A.grad is not None and B.grad is not None
            moved = step.parameters_by_site[path]
            torch.testing.assert_close(moved["A"].detach(), A.detach() - 0.05 * A.grad, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(moved["B"].detach(), B.detach() - 0.05 * B.grad, rtol=1e-9, atol=1e-12)
            assert torch.equal(step.weights[f"{path}.weight"], getattr(model, path).weight)
    merged = step.merge()
    with torch.no_grad():
        found = step.forward(x=batch(99)["x"])
        torch.testing.assert_close(found, merged(batch(99)["x"]), rtol=1e-12, atol=1e-12)


def test_flat_lora_without_noise_is_lora() -> None:
    flat = compiled("with flat_lora(rank = 2, alpha = 4, rho = 0)")
    plain = compiled("with lora(rank = 2, alpha = 4)")
    for number in range(4):
        assert float(flat(batch(number)).loss) == pytest.approx(float(plain(batch(number)).loss), rel=1e-12)


@pytest.mark.parametrize("strategy", ["branch", "fold"])
def test_every_strategy_reads_the_same_noise(strategy: str) -> None:
    with pytest.raises(surgery.SurgError, match="it is another weight in training"):
        compiled(f"strategy = recompute  with {RULES['flat_lora']}")
    step, other = compiled(f"with {RULES['flat_lora']}"), compiled(f"strategy = {strategy}  with {RULES['flat_lora']}")
    for number in range(5):
        expected = float(step(batch(number)).loss)
        assert float(other(batch(number)).loss) == pytest.approx(expected, rel=1e-9)


def test_masked_entries_do_not_move() -> None:
    """The momentum included: an entry stays to the bit, or moves; about half of each factor stays."""
    step = compiled("with rm_lora(rank = 4, orth = 0.1)")
    stayed, seen = 0, 0
    for number in range(STEPS):
        before = copied(step)
        step(batch(number))
        now = copied(step)
        for path in SITES:
            for place, name in enumerate("AB"):
                key = now[f"{path}.bernoulli_key" + ("_2" if place else "")]
                mask = bernoulli(now[f"{path}.A"], key, number, 0.5, list(now[f"{path}.{name}"].shape))
                same = now[f"{path}.{name}"] == before[f"{path}.{name}"]
                assert bool(same[mask == 0].all())
                if number > 1:  # B moves from 0, A waits for it
                    assert not bool(same[mask == 1].any())
                stayed, seen = stayed + int((mask == 0).sum()), seen + mask.numel()
    assert stayed / seen == pytest.approx(0.5, abs=0.05)


# --- some sites at a time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw(lr = 0.05, weight_decay = 0.1)", "sgd(lr = 0.05, momentum = 0.9)"])
def test_only_some_weights_learn_at_a_time(optimizer: str) -> None:
    """Two of three for four steps each; the third does not move, by momentum or weight decay neither."""
    step = compiled("with lora(rank = 2)  active = random(2, every = 4)", optimizer=optimizer)
    paths, learned = SITES, []
    for number in range(STEPS):
        before = copied(step)
        step(batch(number))
        now = copied(step)
        moved = {path for path in paths if not torch.equal(now[f"{path}.B"], before[f"{path}.B"])}
        assert len(moved) == 2
        for path in set(paths) - moved:
            assert torch.equal(now[f"{path}.A"], before[f"{path}.A"])
        learned.append(moved)
    assert all(learned[number] == learned[number // 4 * 4] for number in range(STEPS))
    assert [{paths[number] for number in chosen(3, 2, period, "0 0")} for period in range(3)] == learned[::4]


def test_all_weights_have_their_turn() -> None:
    seen = [chosen(36, 11, period, "0 0") for period in range(100)]
    assert all(len(one) == 11 for one in seen)
    counts = [sum(number in one for one in seen) for number in range(36)]
    assert min(counts) > 10 and max(counts) < 60


def test_boosters_of_chosen_weights_leave_the_others_as_they_are() -> None:
    """Over one period W of the others stays to the bit; in the end each W has a rank of at most its boosters."""
    step = compiled("with xgblora(period = 4)  active = random(1, every = 4)")
    paths = SITES
    before, boosters = copied(step), dict.fromkeys(paths, 0)
    for number in range(STEPS):
        step(batch(number))
        if (number + 1) % 4 == 0:
            now = copied(step)
            moved = [path for path in paths if not torch.equal(now[f"{path}.weight"], before[f"{path}.weight"])]
            assert [paths.index(path) for path in moved] == list(chosen(3, 1, number // 4, "0 0"))
            boosters[moved[0]] += 1
            before = now
    for path, count in boosters.items():
        change = step.weights[f"{path}.weight"].detach() - getattr(ThreeLayers(), path).weight.detach()
        assert int(torch.linalg.matrix_rank(change)) == count
