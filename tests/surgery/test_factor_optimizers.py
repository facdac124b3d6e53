"""Optimizers that know the factors of a product: where they get them from, and the equations of their papers."""

from __future__ import annotations

import copy
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import surgery
from surgery.cli.plan_table import print_plan
from surgery.compiler.memory import predicted
from surgery.optimizers import OPTIMIZERS
from surgery.runtime.run_folder import load_state
from tests.surgery.optimizers import SITES, Network, batch, distance, put, step_of

METHODS = {
    "pairs": "lora(rank = 3, alpha = 6)",
    "half_pairs": "lora_fa(rank = 3, alpha = 6)",
    "triples": "geolora(rank = 3, alpha = 6)",
}
RUNS = {
    "lora_plus": "lora_plus(adamw(lr = 1e-2), ratio = 4)",
    "riemannian": "riemannian(adamw(lr = 1e-2), damping = 1e-3, relative = true)",
    "lora_fa": "lora_fa(adamw(lr = 1e-2))",
    "lora_pro": "lora_pro(adamw(lr = 1e-2, weight_decay = 0.01))",
    "geolora": "geolora(adamw(lr = 2e-2), tolerance = 0.05, period = 3)",
    "lora_rite": "lora_rite(lr = 1e-2, weight_decay = 0.01, escape = true)",
}


def method_for(name: str) -> str:
    """A method of the library with what an optimizer needs."""
    need = OPTIMIZERS[name].needs
    assert need is not None
    return METHODS[need]


def factors_of(step: Any) -> list[tuple[Tensor, Tensor]]:
    """Left and right of all sites, as they are now."""
    return [(site["B"].detach().clone(), site["A"].detach().clone()) for site in step.parameters_by_site.values()]


def turn() -> Tensor:
    """An invertible matrix that is far from orthogonal."""
    drawn = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return drawn + 2 * torch.diag(torch.tensor([1.0, -0.5, 3.0], dtype=torch.float64))


# --- where the factors come from --------------------------------------------------------------------------------------

RENAMED = """
method renamed(rank: int = 3) {
    late = train zeros[out, rank]
    gain = train ones[out, 1]
    early = train kaiming_uniform[in, rank]
    delta = gain * (2 * late @ (early / 4).T)
}
"""


def test_factors_are_found_in_the_equation_whatever_their_names_and_order() -> None:
    program = surgery.parse(RENAMED + "adapt first { with renamed() }\nstep { optimizer = riemannian(sgd(lr = 0.1)) }")
    (found,) = surgery.plan(program, Network()).factors
    assert found.tensors == ("first.late", "first.early")
    assert (found.turned, found.scale) == ((False, True), 0.5)


@pytest.mark.parametrize(
    "equation",
    [
        "B @ A + 0.1 * fro(B) * B @ A",  # B is read alone
        "B @ A + 2 * stop(A).T @ A",  # A twice, once with itself
        "B @ A @ B @ A",  # a product and then its factors
        "B @ diag(c) @ A",  # something between them
        "B @ A + B @ C",  # one factor of two products
    ],
)
def test_a_tensor_that_is_read_in_another_way_is_no_factor(equation: str) -> None:
    shapes = {"B": "[out, rank]", "A": "[rank, in]", "C": "[rank, in]", "c": "[rank]"}
    tensors = [f"{name} = train normal(1.0){shape}" for name, shape in shapes.items() if name in equation]
    method = f"method mine(rank: int = 3) {{ requires in == out;  {';  '.join(tensors)};  delta = {equation} }}"
    with pytest.raises(surgery.SurgError) as raised:
        spec = f"{method}\nadapt first {{ with mine() }}\nstep {{ optimizer = riemannian(sgd(lr = 0.1)) }}"
        surgery.plan(surgery.parse(spec), Network())
    (found,) = raised.value.diagnostics
    assert found.code == "SURG039" and found.span is not None and "adamw, " in str(found.help)


def test_tensors_shared_with_another_site_are_no_factors_unless_both_are() -> None:
    shared = "method tied(rank: int = 3) {{ A = train normal(1.0)[rank, in] {a}\n B = train zeros[out, rank] {b}\n"
    shared += " delta = B @ A }}\nadapt {{first,second}} {{ with tied() }}\n"
    shared += "step {{ optimizer = riemannian(sgd(lr = 0.1)) }}"
    both = surgery.plan(surgery.parse(shared.format(a="shared by model", b="shared by model")), Network())
    assert [one.site for one in both.factors] == ["first"]
    with pytest.raises(surgery.SurgError, match="SURG039"):
        surgery.plan(surgery.parse(shared.format(a="shared by model", b="")), Network())


def test_both_terms_of_a_composition_are_pairs_and_the_rest_is_left_to_the_optimizer_around() -> None:
    rules = "train third { lr = 1e-3 }"
    spec = f"adapt first {{ with lora(rank = 2) + lora(rank = 3) + circulant() }}\n{rules}\n"
    spec += "step { optimizer = riemannian(sgd(lr = 0.1))  loss = mse }"
    step = surgery.compile(surgery.parse(spec), Network(), {"x": batch()["x"]})
    assert [one.tensors for one in step.plan.factors] == [
        ("first.lora.B", "first.lora.A"), ("first.lora_2.B", "first.lora_2.A"),
    ]  # fmt: skip
    before = {name: tensor.detach().clone() for name, tensor in step.weights.items()}
    step(batch())
    moved = {name for name, tensor in step.weights.items() if not torch.equal(tensor.detach(), before[name])}
    assert {"third.weight", "third.bias", "first.lora.B", "first.lora_2.B"} <= moved and "first.weight" not in moved


# --- the equations ----------------------------------------------------------------------------------------------------


def test_the_first_move_of_lora_plus_has_its_ratio() -> None:
    step = step_of("lora_plus(adamw(lr = 1e-3, eps = 1e-30), ratio = 16)")
    put(step)
    before = factors_of(step)
    step(batch())
    for (left, right), (new_left, new_right) in zip(before, factors_of(step), strict=True):
        ratios = (new_left - left).abs().mean() / (new_right - right).abs().mean()
        assert abs(float(ratios) - 16) < 1e-9
        assert float((new_right - right).abs().max()) == pytest.approx(1e-3, rel=1e-9)


def gradients_of(step: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """dL/dM, `[out, in]`, of each site, of a plain network with the weights that the sites have; and the factors."""
    model = Network()
    layers = [model.first, model.second, model.third]
    with torch.no_grad():
        for site, layer in zip(SITES, layers, strict=True):
            layer.weight.copy_(step.effective_weight(site))
    data = batch()
    torch.autograd.backward(torch.nn.functional.mse_loss(model(data["x"]), data["labels"]))
    found = []
    for layer, (left, right) in zip(layers, factors_of(step), strict=True):
        assert layer.weight.grad is not None
        found.append((layer.weight.grad, left, right))
    return found


SCALE = 2.0  # alpha / rank


def test_riemannian_steps_are_the_equations() -> None:
    step = step_of("riemannian(sgd(lr = 0.1), damping = 0.01)")
    put(step)
    known = gradients_of(step)
    step(batch())
    for (g, left, right), (new_left, new_right) in zip(known, factors_of(step), strict=True):
        eye = 0.01 * torch.eye(3, dtype=torch.float64)
        expected = left - 0.1 * SCALE * g @ right.T @ torch.linalg.inv(right @ right.T + eye)
        torch.testing.assert_close(new_left, expected, rtol=1e-10, atol=1e-12)
        expected = right - 0.1 * torch.linalg.inv(left.T @ left + eye) @ (SCALE * left.T @ g)
        torch.testing.assert_close(new_right, expected, rtol=1e-10, atol=1e-12)


def drift(optimizer: str, steps: int = 30) -> float:
    """How far the weights are apart after some steps from two pairs of factors of the same products."""
    one, other = step_of(optimizer), step_of(optimizer)
    put(one)
    put(other, turn())
    assert distance(one, other) < 1e-13
    start = [weight.clone() for weight in map(one.effective_weight, SITES)]
    for number in range(steps):
        for step in (one, other):
            step(batch(seed=number))
    assert all((one.effective_weight(site) - then).abs().max() > 1e-2 for site, then in zip(SITES, start, strict=True))
    return distance(one, other)


@pytest.mark.parametrize(
    ("optimizer", "bound"),
    [
        ("riemannian(sgd(lr = 0.03), damping = 0)", 1e-11),
        ("lora_rite(lr = 1e-2)", 1e-10),
        ("lora_rite(lr = 1e-2, weight_decay = 0.1, clip = 0.01, escape = true)", 1e-10),
        ("lora_rite(lr = 1e-2, clip = 0, skip = 0)", 1e-10),
    ],
)
def test_the_weights_do_not_depend_on_how_the_product_is_factored(optimizer: str, bound: float) -> None:
    assert drift(optimizer) < bound


@pytest.mark.parametrize(
    "optimizer", ["adamw(lr = 1e-2)", "sgd(lr = 0.03)", "riemannian(sgd(lr = 0.03), damping = 0.01)"]
)
def test_other_optimizers_depend_on_it(optimizer: str) -> None:
    assert drift(optimizer) > 1e-3


def test_relative_damping_scales_with_the_factors() -> None:
    def after(settings: str, factor: float) -> Any:
        step = step_of(f"riemannian(sgd(lr = 0.03), damping = 0.1{settings})")
        put(step, factor * torch.eye(3, dtype=torch.float64))
        for number in range(5):
            step(batch(seed=number))
        return step

    assert distance(after(", relative = true", 1), after(", relative = true", 7)) < 1e-12
    assert distance(after("", 1), after("", 7)) > 1e-4


def test_corrected_gradients_of_one_factor_are_the_projection_of_the_full_gradient() -> None:
    step = step_of("lora_fa(sgd(lr = 0.1), damping = 0)", METHODS["half_pairs"])
    put(step)
    known = gradients_of(step)
    step(batch())
    for (g, left, right), (new_left, new_right) in zip(known, factors_of(step), strict=True):
        assert torch.equal(new_right, right)
        projection = right.T @ torch.linalg.inv(right @ right.T) @ right
        torch.testing.assert_close(SCALE * (left - new_left) @ right / 0.1, g @ projection, rtol=1e-10, atol=1e-12)


def test_a_frozen_left_factor_is_as_well_corrected() -> None:
    method = """method other(rank: int = 3) {
        A = train zeros[rank, in];  B = frozen normal(1.0)[out, rank];  delta = 2 * B @ A
    }\n"""
    optimizer = "step { optimizer = lora_fa(sgd(lr = 0.1), damping = 0)  loss = mse }"
    spec = surgery.parse(f"{method} adapt {{first,second,third}} {{ with other() }}\n{optimizer}")
    step = surgery.compile(spec, Network(), {"x": batch()["x"]})
    known = gradients_of(step)
    step(batch())
    for (g, left, right), (_, new_right) in zip(known, factors_of(step), strict=True):
        projection = left @ torch.linalg.inv(left.T @ left) @ left.T
        torch.testing.assert_close(2 * left @ (right - new_right) / 0.1, projection @ g, rtol=1e-10, atol=1e-12)


def projected(g: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """What of g is tangent to the matrices of the rank of `left @ right`."""
    on_left = left @ torch.linalg.inv(left.T @ left) @ left.T
    on_right = right.T @ torch.linalg.inv(right @ right.T) @ right
    found: Tensor = on_left @ g + g @ on_right - on_left @ g @ on_right
    return found


def closest_moves(g: Tensor, left: Tensor, right: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """LoRA-Pro's moves as one least-squares problem over all entries of both, the shortest of the best ones in X."""
    p, q = torch.linalg.inv(left.T @ left), torch.linalg.inv(right @ right.T)
    of_left, of_right = SCALE * g @ right.T, SCALE * left.T @ g
    outside = torch.eye(len(left), dtype=g.dtype) - left @ p @ left.T
    plain = outside @ of_left @ q / SCALE**2, p @ of_right / SCALE**2
    # (left.T left) X + X (right right.T) = c, row by row: the Kronecker product is the matrix of that map
    c = -p @ of_right @ right.T / SCALE**2
    eye = torch.eye(3, dtype=g.dtype)
    map_of_x = torch.kron(left.T @ left, eye) + torch.kron(eye, right @ right.T)
    x = torch.linalg.solve(map_of_x, c.reshape(-1)).reshape(3, 3)
    return lr * (plain[0] - left @ x), lr * (plain[1] + x @ right)


def test_what_lora_pro_does_to_the_product_is_the_projected_gradient() -> None:
    step = step_of("lora_pro(sgd(lr = 1e-3), damping = 0)")
    put(step)
    known = gradients_of(step)
    step(batch())
    for (g, left, right), (new_left, new_right) in zip(known, factors_of(step), strict=True):
        moved_left, moved_right = (left - new_left) / 1e-3, (right - new_right) / 1e-3
        effect = SCALE * (left @ moved_right + moved_left @ right)
        torch.testing.assert_close(effect, projected(g, left, right), rtol=1e-9, atol=1e-11)
        of_left, of_right = SCALE * g @ right.T, SCALE * left.T @ g
        change = (moved_left - of_left).square().sum() + (moved_right - of_right).square().sum()
        for seed in range(200):  # any other X has the same effect and changes the gradients more
            x = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3
            other = moved_left - left @ x - of_left, moved_right + x @ right - of_right
            assert other[0].square().sum() + other[1].square().sum() > change
        assert (moved_left * of_left).sum() + (moved_right * of_right).sum() > 0  # downhill


def test_lora_pro_around_adamw_is_adamw_of_the_projected_gradient() -> None:
    step = step_of("lora_pro(adamw(lr = 1e-2, betas = [0.8, 0.9], weight_decay = 0.1), damping = 0)")
    put(step)
    means, squares = ([torch.zeros(*shape).double() for shape in ((8, 8), (8, 8), (6, 8))] for _ in range(2))
    for number in range(1, 6):
        known = gradients_of(step)
        step(batch())
        for index, ((g, left, right), (new_left, new_right)) in enumerate(zip(known, factors_of(step), strict=True)):
            equivalent = projected(g, left, right)
            means[index] = 0.8 * means[index] + 0.2 * equivalent
            squares[index] = 0.9 * squares[index] + 0.1 * equivalent**2
            adapted = means[index] / (1 - 0.8**number) / ((squares[index] / (1 - 0.9**number)).sqrt() + 1e-8)
            moved_left, moved_right = closest_moves(adapted, left, right, 1e-2)
            torch.testing.assert_close(new_left, left * (1 - 1e-3) - moved_left, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(new_right, right * (1 - 1e-3) - moved_right, rtol=1e-8, atol=1e-10)


def rite_in_plain(step: Any, lr: float, steps: int, clip: float, skip: float) -> list[Tensor]:
    """LoRA-RITE with QR factors, a site and a factor at a time; gives the products after the steps."""
    pairs = [[left, right.T] for left, right in factors_of(step)]
    states = [[{"m": 0 * one, "v": torch.zeros(3, 3).double(), "u": 0 * other, "e": torch.zeros(()).double()}
               for one, other in (pair, pair[::-1])] for pair in pairs]  # fmt: skip
    for number in range(steps):
        with torch.no_grad():
            for site, (left, columns) in zip(step.parameters_by_site.values(), pairs, strict=True):
                site["B"].copy_(left)
                site["A"].copy_(columns.T)
        known = gradients_of(step)
        unmagnified, bases, inverses = [], [], []
        for g, left, right in known:
            (u_left, r_left), (u_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
            found = [SCALE * g @ u_right, SCALE * g.T @ u_left]
            unmagnified += [0 * one if one.square().mean().sqrt() > skip else one for one in found]
            bases += [u_right, u_left]
            inverses += [torch.linalg.inv(r_right), torch.linalg.inv(r_left)]
        norm = torch.cat([one.reshape(-1) for one in unmagnified]).norm()
        for index, gradient in enumerate(unmagnified):
            gradient = gradient * min(1.0, clip / float(norm))
            pair, state = pairs[index // 2], states[index // 2][index % 2]
            p = bases[index].T @ state["u"]
            b1, b2 = (b * (1 - b**number) / (1 - b ** (number + 1)) for b in (0.9, 0.999))
            turned = p @ state["v"] @ p.T
            lost = (torch.linalg.eigvalsh(state["v"]) - torch.linalg.eigvalsh(turned)).max()
            lost = torch.minimum(lost.clamp(min=0), (state["v"].trace() - turned.trace()).clamp(min=0))
            state["e"] = b2 * (state["e"] + lost)
            state["v"] = (1 - b2) * gradient.T @ gradient / len(gradient) + b2 * turned
            w, q = torch.linalg.eigh(state["v"])
            scaled = gradient @ q @ torch.diag(1 / ((w.clamp(min=0) + state["e"]).sqrt() + 1e-6)) @ q.T
            state["m"] = (1 - b1) * scaled + b1 * state["m"] @ p.T
            state["u"] = bases[index]
            pair[index % 2] = pair[index % 2] - lr * state["m"] @ inverses[index].T
    return [SCALE * left @ columns.T for left, columns in pairs]


@pytest.mark.parametrize(("clip", "skip"), [(0.05, 10.0), (1.0, 1.0)])
def test_lora_rite_is_the_algorithm_with_other_bases(clip: float, skip: float) -> None:
    optimizer = f"lora_rite(lr = 1e-2, escape = true, clip = {clip}, skip = {skip})"
    step, plain = step_of(optimizer), step_of(optimizer)
    put(step)
    put(plain)
    products = rite_in_plain(plain, 1e-2, 8, clip, skip)
    for _ in range(8):
        step(batch())
    for (left, right), expected in zip(factors_of(step), products, strict=True):
        torch.testing.assert_close(SCALE * left @ right, expected, rtol=1e-8, atol=1e-9)


# --- all of them ------------------------------------------------------------------------------------------------------


def test_every_optimizer_of_factors_is_tested() -> None:
    assert RUNS.keys() == {name for name, kind in OPTIMIZERS.items() if kind.needs in METHODS}


@pytest.mark.parametrize("name", RUNS)
def test_it_starts_where_a_factor_is_zero_and_learns(name: str) -> None:
    step = step_of(RUNS[name], method_for(name))
    first = float(step(batch()).loss)
    for _ in range(60):
        last = float(step(batch()).loss)
    assert last < 0.9 * first


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_to_the_bit(name: str, dtype: str, tmp_path: Path) -> None:
    def new() -> Any:
        settings = f"steps = 9  clip = 1.0  schedule = linear(warmup = 2)  adapter_dtype = {dtype}"
        return step_of(RUNS[name], method_for(name), settings, "", torch.float32)

    unbroken = new()
    for number in range(9):
        if number == 4:
            unbroken.save(tmp_path)
        unbroken(batch(torch.float32, number))
    resumed = new()
    resumed.load_state_dict(load_state(tmp_path).state)
    for number in range(4, 9):
        resumed(batch(torch.float32, number))
    for key, value in unbroken.state_dict()["weights"].items():
        assert torch.equal(value, resumed.state_dict()["weights"][key]), key


@pytest.mark.parametrize("name", RUNS)
def test_gradients_are_after_its_step_what_they_were(name: str) -> None:
    step = step_of(RUNS[name], method_for(name))
    for _ in range(3):  # also between the moves of an optimizer that does not move everything in each step
        step._namespace["gradients"](step.weights, batch())
        trained = [tensor for tensor in step.weights.values() if tensor.requires_grad]
        before = [tensor.grad.clone() for tensor in trained]
        step.optimizer.step()
        assert all(torch.equal(tensor.grad, then) for tensor, then in zip(trained, before, strict=True))
        step.optimizer.zero_grad()


@pytest.mark.parametrize(("name", "launches"), [("riemannian", 1), ("lora_fa", 1), ("lora_pro", 1), ("lora_rite", 2)])
def test_all_sites_are_decomposed_at_once(name: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = step_of(RUNS[name].replace("escape = true", "escape = false"), method_for(name)), []
    decompose = torch.linalg.eigh

    def counted(matrix: Tensor) -> Any:
        calls.append(matrix.shape)
        return decompose(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    step(batch())
    factors = 3 if name == "lora_fa" else 6  # LoRA-RITE decomposes their second moments too
    assert calls == [(factors, 3, 3)] * launches


def test_what_is_reset_is_forgotten() -> None:
    step = step_of(RUNS["lora_rite"])
    for number in range(3):
        step(batch(seed=number))
    before = copy.deepcopy(step.optimizer.state_dict()["factors"])
    step.optimizer.forget([step.weights["second.A"]])
    after = step.optimizer.state_dict()["factors"]
    for key, values in after.items():
        for name, value in values.items():
            assert torch.equal(value, 0 * value if key == "second.A" else before[key][name])


@pytest.mark.parametrize("name", RUNS)
def test_its_state_is_float32_under_the_names_of_tensors(name: str) -> None:
    step = step_of(RUNS[name], method_for(name), "adapter_dtype = bfloat16", "", torch.float32)
    for number in range(2):
        step(batch(torch.float32, number))
    state = step.optimizer.state_dict()
    keys = {tensor.key for site in step.plan.sites for tensor in site.tensors}
    for found, values in state.get("factors", {}).items():
        assert set(found.split(" @ ")) <= keys
        assert all(value.dtype == torch.float32 for value in values.values())


@pytest.mark.parametrize(("base", "said"), [("adamw", True), ("sgd", False)])
def test_the_plan_says_what_is_kept_of_full_size(base: str, said: bool) -> None:
    output = StringIO()
    print_plan(Console(file=output, width=200), step_of(f"lora_pro({base}(lr = 1e-3))").plan)
    line = "lora_pro keeps 2 moments of the full size of each of 3 products: 0.003 MiB"
    assert (line in output.getvalue()) == said


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_takes_its_memory_and_says_its_name(name: str) -> None:
    step = step_of(RUNS[name], method_for(name))
    assert predicted(step, 1, "cpu").optimizer > 0
    assert step.plan.step.optimizer.name == name
