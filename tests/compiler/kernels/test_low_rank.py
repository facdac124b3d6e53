"""The low-rank linear against its definition in float64, and in all that surrounds an operation of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from surgery.compiler.kernels.low_rank import low_rank_linear, low_rank_linear_reference

# norm of the difference over norm of the reference: some units of the last place of each dtype
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    lefts: list[Tensor]
    rights: list[Tensor]
    scales: list[float]
    narrow: Tensor | None = None

    def __call__(self, function: Any = low_rank_linear) -> list[Tensor]:
        result: list[Tensor] = function(
            self.x, self.weights, self.biases, self.lefts, self.rights, self.scales, self.narrow
        )
        return result

    @property
    def trained(self) -> list[Tensor]:
        candidates = [self.x, self.narrow, *self.biases, *self.lefts, *self.rights]
        return [tensor for tensor in candidates if tensor is not None and tensor.requires_grad]

    def exact(self) -> Call:
        """The same numbers in float64, separate leaves."""

        def of(tensor: Any) -> Any:
            return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

        weights, biases, lefts, rights = (
            [of(part) for part in each] for each in (self.weights, self.biases, self.lefts, self.rights)
        )
        return Call(of(self.x), weights, biases, lefts, rights, self.scales, of(self.narrow))


def call(
    shape: tuple[int, ...] = (2, 3, 8), outs: tuple[int, ...] = (5, 7), ranks: tuple[int, ...] = (2, 3),
    dtype: torch.dtype = torch.float64, master: torch.dtype | None = None, bias: bool = True, dropped: bool = False,
    seed: int = 0,
) -> Call:  # fmt: skip
    """Random arguments, all of which want gradients except the weights; the last site has no bias."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int, dtype: torch.dtype = dtype, trained: bool = True) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(trained)

    factor, width = master or dtype, shape[-1]
    return Call(
        random(*shape),
        [random(out, width, trained=False) for out in outs],
        [random(out) if bias and site != len(outs) - 1 else None for site, out in enumerate(outs)],
        [random(out, rank, dtype=factor) for out, rank in zip(outs, ranks, strict=True)],
        [random(rank, width, dtype=factor) for rank in ranks],
        [0.5 * (1 + site) for site in range(len(outs))],
        random(*shape) if dropped else None,
    )


def gradients(ys: list[Tensor], trained: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(ys, trained, [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)]))


def assert_close(given: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(given, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).norm() <= tolerance * other.norm() + 1e-300


def assert_exact(one: Call) -> None:
    """Values and all gradients are those of the definition in float64."""
    ys, exact = one(), one.exact()
    expected = exact(low_rank_linear_reference)
    dys = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in ys]
    tolerance = TOLERANCE[one.x.dtype]
    assert all(y.dtype == one.x.dtype for y in ys)
    assert_close(ys, expected, tolerance)
    found = gradients(ys, one.trained, dys)
    assert [part.dtype for part in found] == [part.dtype for part in one.trained]
    assert_close(found, gradients(expected, exact.trained, dys), tolerance)


@settings(deadline=None, max_examples=60)
@given(
    lead=st.lists(st.integers(1, 5), max_size=3), width=st.integers(1, 19), bias=st.booleans(),
    dropped=st.booleans(), sites=st.lists(st.tuples(st.integers(1, 23), st.integers(1, 9)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_is_its_definition_at_any_size(
    lead: list[int], width: int, bias: bool, dropped: bool, sites: list[tuple[int, int]], dtype: torch.dtype, seed: int
) -> None:
    outs, ranks = zip(*sites, strict=True)
    assert_exact(call((*lead, width), outs, ranks, dtype, bias=bias, dropped=dropped, seed=seed))


@pytest.mark.parametrize("master", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_its_masters(dtype: torch.dtype, master: torch.dtype | None) -> None:
    assert_exact(call((6, 64), (48, 32), (4, 8), dtype, master))


def test_gradients_are_those_of_finite_differences() -> None:
    one = call((3, 4), (5, 2), (2, 1), dropped=True)

    def function(*trained: Tensor) -> tuple[Tensor, ...]:
        x, narrow, bias, *factors = trained
        return tuple(replace(one, x=x, narrow=narrow, biases=[bias, None], lefts=factors[:2], rights=factors[2:])())

    assert torch.autograd.gradcheck(function, one.trained)


def test_any_strides() -> None:
    one = call((4, 6, 8), (5, 7), (2, 3))
    turned = replace(
        one,
        x=torch.randn(8, 6, 4, dtype=torch.float64).permute(2, 1, 0).requires_grad_(),
        weights=[torch.randn(8, 5, dtype=torch.float64).T, torch.randn(7, 16, dtype=torch.float64)[:, ::2]],
        lefts=[torch.randn(2, 5, dtype=torch.float64).T.requires_grad_(), one.lefts[1]],
        rights=[one.rights[0], torch.randn(8, 3, dtype=torch.float64).T.requires_grad_()],
    )
    assert_exact(turned)
    ys, expected = turned(), turned(low_rank_linear_reference)
    spread = [torch.randn((), dtype=torch.float64).expand(y.shape) for y in ys]  # what a sum's backward gives
    assert_close(
        gradients(ys, turned.trained, spread), gradients(expected, turned.trained, spread), TOLERANCE[torch.float64]
    )


def test_no_rows() -> None:
    one = call((0, 8))
    ys = one()
    assert [y.shape for y in ys] == [(0, 5), (0, 7)]
    found = torch.autograd.grad(torch.cat(ys, 1).sum(), one.trained)
    assert all(part.shape == like.shape and not part.any() for part, like in zip(found, one.trained, strict=True))


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("frozen", ["x", "lefts", "rights", "x lefts", "x rights", "lefts rights"])
def test_only_what_is_trained_is_computed(frozen: str, dropped: bool) -> None:
    one = call(dropped=dropped)
    for name in frozen.split():
        for tensor in one.lefts if name == "lefts" else one.rights if name == "rights" else [one.x]:
            tensor.requires_grad_(False)
    assert_exact(one)
    full = call(dropped=dropped)
    with FlopCounterMode(display=False) as fewer:
        gradients(ys := one(), one.trained, ys)
    with FlopCounterMode(display=False) as all_of_it:
        gradients(ys := full(), full.trained, ys)
    assert fewer.get_total_flops() < all_of_it.get_total_flops()


def test_an_output_that_nothing_reads_has_no_part_in_the_gradients() -> None:
    one = call()
    first = one()[0]
    found = torch.autograd.grad(first.sum(), [one.lefts[0], one.lefts[1]])
    assert found[0].any()
    assert not found[1].any()


def test_a_weight_that_is_not_frozen_gets_its_gradient() -> None:
    """Whoever thaws one gets what a linear layer gives."""
    found, expected = call(), call()
    for one, function in ((found, low_rank_linear), (expected, low_rank_linear_reference)):
        one.weights[1].requires_grad_()
        torch.autograd.backward([y.sin().sum() for y in one(function)])
    assert found.weights[0].grad is None and found.weights[1].grad is not None
    for ours, theirs in zip([found.weights[1], *found.trained], [expected.weights[1], *expected.trained], strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_transforms_of_torch_func() -> None:
    one = call()
    single = torch.func.vmap(lambda x: replace(one, x=x)()[0])
    torch.testing.assert_close(single(one.x), one()[0], rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(one()[1].sin().sum(), one.lefts[1])
    found = torch.func.grad(lambda left: replace(one, lefts=[one.lefts[0], left])()[1].sin().sum())(one.lefts[1])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_no_gradient_is_needed() -> None:
    one = call()
    with torch.no_grad():
        ys = one()
    assert not any(y.requires_grad for y in ys)
    assert_close(ys, one(low_rank_linear_reference), TOLERANCE[torch.float64])


def test_what_is_kept_is_the_input_the_factors_and_narrow_rows() -> None:
    one = call((32, 64), (48, 40), (2, 3))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        one()
    known = {tensor.data_ptr() for tensor in (one.x, *one.weights, *one.lefts, *one.rights)}
    new = [tensor for tensor in kept if tensor.data_ptr() not in known]
    assert [tensor.shape for tensor in new] == [(32, 5)]


@pytest.mark.parametrize("dropped", [False, True])
def test_compiled_is_eager(dropped: bool) -> None:
    one = call((4, 6, 16), (24, 8), (2, 4), torch.float32, dropped=dropped)
    compiled = torch.compile(lambda given: one(low_rank_linear), fullgraph=True, backend="aot_eager")
    dys = [torch.randn_like(y) for y in one()]
    for here, there in zip(
        [*one(), *gradients(one(), one.trained, dys)],
        [*compiled(one), *gradients(compiled(one), one.trained, dys)],
        strict=True,
    ):
        assert torch.equal(here, there)


def test_checkpointed_is_eager() -> None:
    one = call(dtype=torch.float32)
    dys = [torch.randn_like(y) for y in one()]
    again = checkpoint(lambda x: replace(one, x=x)(), one.x, use_reentrant=False)
    assert again is not None
    for here, there in zip(gradients(one(), one.trained, dys), gradients(again, one.trained, dys), strict=True):
        assert torch.equal(here, there)


def test_autocast_runs_it_as_it_runs_a_linear() -> None:
    one = call((6, 32), (16, 24), (4, 4), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ys = one()
        like = torch.nn.functional.linear(one.x, one.weights[0])
    assert [y.dtype for y in ys] == [like.dtype, like.dtype] == [torch.bfloat16] * 2
    exact = one.exact()
    expected = exact(low_rank_linear_reference)
    dys = [torch.randn_like(y) for y in ys]
    assert_close(ys, expected, TOLERANCE[torch.bfloat16])
    found = gradients(ys, one.trained, dys)
    assert {part.dtype for part in found} == {torch.float32}
    assert_close(found, gradients(expected, exact.trained, dys), TOLERANCE[torch.bfloat16])
    wide = call()
    with torch.autocast("cpu", torch.bfloat16):  # leaves float64 alone
        assert wide()[0].dtype == torch.float64


def test_costs_are_counted_on_meta() -> None:
    rows, width, outs, ranks = 32, 64, (48, 40), (2, 3)
    one = call((rows, width), outs, ranks, torch.bfloat16, torch.float32, bias=False)
    lists = ([tensor.to("meta") for tensor in each] for each in (one.weights, one.lefts, one.rights))
    weights, lefts, rights = lists
    for tensor in (*lefts, *rights):
        tensor.requires_grad_()
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        ys = low_rank_linear(x, weights, one.biases, lefts, rights, one.scales)
        assert [y.shape for y in ys] == [(rows, out) for out in outs]
        torch.autograd.grad(ys, [x, *lefts, *rights], [torch.empty_like(y) for y in ys])
    wide, factors = (
        sum(out * width for out in outs),
        sum(rank * (out + width) for out, rank in zip(outs, ranks, strict=True)),
    )
    assert counted.get_total_flops() == 2 * rows * (2 * wide + 3 * factors)


@pytest.mark.parametrize("dropped", [False, True])
def test_torch_accepts_the_operation(dropped: bool) -> None:
    one = call((2, 3, 8), dtype=torch.float32, dropped=dropped)
    arguments = (one.x, one.narrow, one.weights, one.biases, one.lefts, one.rights, one.scales)
    torch.library.opcheck(torch.ops.surgery.low_rank_linear.default, arguments)
