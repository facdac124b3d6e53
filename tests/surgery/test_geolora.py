"""GeoLoRA: steps along the tangent space of the matrices of a rank, and the rank that they find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.optimizers.factors import Factors
from surgery.optimizers.geolora import GeoLora
from tests.surgery.optimizers import SITES, Network, batch, step_of

SCALE = 2.0


def triples(step: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """U, S and V of all sites as they are now."""
    return [
        (site["U"].detach().clone(), site["S"].detach().clone(), site["V"].detach().clone())
        for site in step.parameters_by_site.values()
    ]


@torch.no_grad()
def fill(step: Any, rank: int) -> None:
    """Orthonormal factors of a rank, the rest of the room zeros, around cores that are far from diagonal."""
    for number, site in enumerate(step.parameters_by_site.values()):
        draw = torch.Generator().manual_seed(number)
        for name, place in (("U", site["U"]), ("V", site["V"].T)):
            q, _ = torch.linalg.qr(torch.randn(len(place), rank, generator=draw, dtype=torch.float64))
            site[name].zero_()
            place[:, :rank].copy_(q)
        site["S"].zero_()
        site["S"][:rank, :rank] = torch.randn(rank, rank, generator=draw, dtype=torch.float64) + torch.eye(rank)


def gradients(step: Any) -> list[Tensor]:
    """dL/dX of `W + scale * X`, by a plain network."""
    model = Network()
    layers = [model.first, model.second, model.third]
    with torch.no_grad():
        for site, layer in zip(SITES, layers, strict=True):
            layer.weight.copy_(step.effective_weight(site))
    data = batch()
    torch.autograd.backward(F.mse_loss(model(data["x"]), data["labels"]))
    return [SCALE * layer.weight.grad for layer in layers if layer.weight.grad is not None]


def test_a_step_is_the_gradient_on_the_tangent_space() -> None:
    step = step_of("geolora(sgd(lr = 0.05), tolerance = 0)", "geolora(rank = 5, alpha = 10)")
    fill(step, 2)
    known = list(zip(gradients(step), triples(step), strict=True))
    step(batch())
    for (g, (u, s, v)), (new_u, new_s, new_v) in zip(known, triples(step), strict=True):
        left, right = u @ u.T, v.T @ v
        expected = u @ s @ v - 0.05 * (left @ g + g @ right - left @ g @ right)
        torch.testing.assert_close(new_u @ new_s @ new_v, expected, rtol=1e-10, atol=1e-12)
        kept = new_s.diagonal() != 0
        assert int(kept.sum()) == 4, "twice the rank"
        eye = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(new_u[:, kept].T @ new_u[:, kept], eye, rtol=0, atol=1e-12)
        torch.testing.assert_close(new_v[kept] @ new_v[kept].T, eye, rtol=0, atol=1e-12)
        assert torch.equal(new_s, torch.diag(new_s.diagonal())) and not new_u[:, ~kept].any() and not new_v[~kept].any()


@pytest.mark.parametrize("tolerance", [0.05, 0.3, 0.7])
def test_what_is_cut_is_within_the_tolerance_and_no_less_than_could_be(tolerance: float) -> None:
    whole, cut = (
        step_of(f"geolora(sgd(lr = 0.5), tolerance = {value})", "geolora(rank = 6, alpha = 12)")
        for value in (0, tolerance)
    )
    for step in (whole, cut):
        fill(step, 3)
        step(batch())
    for (u, s, v), (new_u, new_s, new_v) in zip(triples(whole), triples(cut), strict=True):
        exact = u @ s @ v
        assert torch.linalg.norm(new_u @ new_s @ new_v - exact) < tolerance * torch.linalg.norm(exact)
        rank = int((new_s.diagonal() != 0).sum())
        values = torch.linalg.svdvals(exact)
        assert torch.linalg.norm(values[rank - 1 :]) >= tolerance * torch.linalg.norm(exact), "one less is too few"


def test_factors_that_are_not_quite_orthonormal_are_made_so_without_a_change_of_their_product() -> None:
    step = step_of("geolora(sgd(lr = 1e-30), tolerance = 0)", "geolora(rank = 3, alpha = 6)")
    fill(step, 3)
    with torch.no_grad():
        for site in step.parameters_by_site.values():
            site["U"].mul_(1.01).add_(0.001)
    before = triples(step)
    step(batch())
    for (u, s, v), (new_u, new_s, new_v) in zip(before, triples(step), strict=True):
        torch.testing.assert_close(new_u @ new_s @ new_v, u @ s @ v, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(new_u.T @ new_u, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_rank_settles_at_that_of_the_target() -> None:
    torch.manual_seed(0)
    target = torch.randn(12, 2, dtype=torch.float64) @ torch.randn(2, 9, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(size, 6, dtype=torch.float64))[0] for size in (12, 9))
    tensors = [nn.Parameter(u), nn.Parameter(torch.zeros(6, 6, dtype=torch.float64)), nn.Parameter(v.T.contiguous())]
    base = torch.optim.SGD([{"params": tensors, "lr": 0.2}])
    factors = Factors(("u", "s", "v"), (tensors[0], tensors[1], tensors[2]), 1.0, (False, False, False))
    optimizer = GeoLora(base, [factors], tolerance=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        torch.autograd.backward((tensors[0] @ tensors[1] @ tensors[2] - target).square().sum() / 2)
        optimizer.step()
    assert int((tensors[1].diagonal() != 0).sum()) == 2
    torch.testing.assert_close(tensors[0] @ tensors[1] @ tensors[2], target, rtol=1e-9, atol=1e-9)


def test_a_warmup_that_begins_at_zero_does_not_lose_the_factors() -> None:
    step = step_of(RUN, "geolora(rank = 3, alpha = 6)", "steps = 30  schedule = constant(warmup = 3)")
    first = triples(step)
    start = float(step(batch()).loss)
    for (u, s, v), (new_u, new_s, new_v) in zip(first, triples(step), strict=True):
        torch.testing.assert_close(new_u, u, rtol=1e-5, atol=1e-6)  # drawn in float32, orthonormal in float64
        torch.testing.assert_close(new_v, v, rtol=1e-5, atol=1e-6)
        assert torch.equal(new_s, s) and not s.any()
    for _ in range(29):
        loss = float(step(batch()).loss)
    assert loss < 0.9 * start


RUN = "geolora(adamw(lr = 2e-2), tolerance = 0.05, period = 3)"


def test_between_its_moves_the_optimizer_around_moves_the_cores_alone_and_starts_anew() -> None:
    step = step_of(RUN, "geolora(rank = 3, alpha = 6)")
    for number in range(7):
        before = triples(step)
        step(batch())
        for (u, s, v), (new_u, new_s, new_v) in zip(before, triples(step), strict=True):
            assert not torch.equal(new_s, s)
            moves = number % 3 != 1  # 0 moves all, 2 cuts after a step of the core
            assert torch.equal(new_u, u) != moves and torch.equal(new_v, v) != moves
        states = [step.optimizer.base.state.get(site["S"], {}) for site in step.parameters_by_site.values()]
        assert all(int(state.get("step", 0)) == (1 if number % 3 == 1 else 0) for state in states)


def test_factors_without_an_orthogonal_start_are_refused() -> None:
    method = "method mine(rank: int = 3) { U = train orthogonal[out, rank]\n S = train zeros[rank, rank]\n"
    method += "V = train normal(1.0)[rank, in]\n delta = U @ S @ V }\n"
    with pytest.raises(surgery.SurgError, match="SURG039"):
        program = surgery.parse(method + "adapt first { with mine() }\nstep { optimizer = geolora(sgd(lr = 0.1)) }")
        surgery.plan(program, Network())
