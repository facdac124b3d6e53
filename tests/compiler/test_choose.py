"""How a site is run: costs that are counted, what is legal, what is automatic, and the reason that is given."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.compiler import p4_choose
from surgery.compiler.algebra.cost import Cost, branch_is_dense, measure
from surgery.compiler.algebra.instance import instance
from surgery.compiler.diagnostics import SurgError
from surgery.compiler.pipeline import resolve
from surgery.compiler.plan import Plan, Site

TOKENS, WIDTH = 8192, 4096
METHODS = """
method released(rank: int = 16) {
    A = train zeros[out, rank];  B = train normal(1.0)[rank, in]
    delta = surrogate(mask(W) * (4.0 * A @ B), A @ B)
}
method by_layer(rank: int = 4) {
    A = train zeros[out, rank];  B = train normal(1.0)[rank, in];  s = train ones[layers]
    delta = mask(W) * (s[layer] * A @ B)
}
method full() { D = train zeros[out, in];  delta = D }
method scaled() { w = train ones[out];  output = w * y }
method norm_of(rank: int = 4) {
    A = train zeros[out, rank];  B = train normal(1.0)[rank, in]
    delta = diag(row_norm(W + A @ B)) @ A @ B
}
"""


class Stack(nn.Module):
    """Linear layers on the meta device."""

    def __init__(self, dtype: torch.dtype, width: int, layers: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [nn.Linear(width, width, bias=False, dtype=dtype, device="meta") for _ in range(layers)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All of them in a row."""
        for layer in self.layer:
            x = layer(x)
        return x


def plan_of(
    method: str,
    dtype: torch.dtype = torch.float32,
    width: int = WIDTH,
    layers: int = 1,
    more: str = "",
    step: str = "",
) -> Plan:
    program = surgery.parse(f"""{METHODS}
        adapt layer.* {{ with {method} {more} }}
        step {{ optimizer = adamw(lr = 1e-3)  batch = 16  steps = 1  loss = mse  {step} }}
        data "rows.jsonl" {{ text = "{{text}}"  label = label  max_length = {TOKENS // 16} }}
    """)
    plan = resolve(program, Stack(dtype, width, layers))
    assert plan.tokens == TOKENS
    return plan


def site_of(method: str, dtype: torch.dtype = torch.float32, **options: Any) -> Site:
    return plan_of(method, dtype, **options).sites[0]


def ways(site: Site) -> dict[str, Any]:
    return {way.strategy: way for way in site.candidates}


def test_operations_are_those_of_the_formulas() -> None:
    """Beyond the frozen site: W is N d d times 4; LoRS saves dW, SparsePEFT does not (per layer, seeds.md 3.4)."""
    rank, square, rows = 16, WIDTH * WIDTH, TOKENS * WIDTH * 16
    released = ways(site_of("released()", torch.bfloat16))
    assert released["recompute"].flops == 2 * 2 * rank * square + 8 * rows
    assert released["fold"].flops == 2 * TOKENS * square + 4 * 2 * rank * square  # the surrogate's product twice
    exact = ways(site_of("sqft(rank = 16)", torch.bfloat16))
    assert exact["fold"].flops == 2 * TOKENS * square + 3 * 2 * rank * square
    assert exact["branch"].flops == 6 * TOKENS * square + 3 * 2 * rank * square
    assert ways(site_of("lora(rank = 16)"))["branch"].flops == 12 * rows


def test_what_is_kept_is_counted() -> None:
    entries, x = WIDTH * WIDTH, 2 * TOKENS * WIDTH
    released = ways(site_of("released()", torch.bfloat16))
    small = 2 * 2 * 16 * WIDTH  # A and B in bfloat16
    assert released["recompute"].kept == x + small
    assert released["fold"].kept >= x + 2 * entries  # the weight itself, and the mask in what the algebra runs
    assert ways(site_of("full()"))["branch"].kept == 2 * x  # x in float32; D is a parameter


@pytest.mark.parametrize(("method", "dtype", "chosen", "reason"), [
    ("lora(rank = 16)", torch.float32, "branch", "times as much"),
    ("lora(rank = 16)", torch.bfloat16, "branch", "fold and recompute lose small updates to rounding"),
    ("dora(rank = 16)", torch.bfloat16, "branch", "fold and recompute lose small updates to rounding"),
    ("norm_of()", torch.bfloat16, "branch", "fold and recompute lose small updates to rounding"),
    ("released()", torch.float32, "recompute", "branch costs"),
    ("released()", torch.bfloat16, "recompute", "branch costs"),
    ("sqft(rank = 16)", torch.bfloat16, "fold", "branch costs"),
    ("sqft(dropout = 0.1)", torch.bfloat16, "branch", "nothing else is legal: dropout acts on its input alone"),
    ("scaled()", torch.float32, "branch", "nothing else is legal"),
])  # fmt: skip
def test_the_choice_and_its_reason(method: str, dtype: torch.dtype, chosen: str, reason: str) -> None:
    site = site_of(method, dtype)
    assert site.strategy == chosen and reason in site.reason
    assert [way.strategy for way in site.candidates] == list(p4_choose.STRATEGIES)


def test_autocast_rounds_a_folded_weight_like_a_model_in_half_precision() -> None:
    assert site_of("lora(rank = 32)", width=64).strategy == "fold"
    site = site_of("lora(rank = 32)", width=64, step="precision = bfloat16")
    assert site.strategy == "branch" and "rounding" in site.reason


def test_recompute_has_to_be_asked_for_where_the_branch_is_cheap() -> None:
    site = site_of("lora(rank = 16)")
    assert ways(site)["recompute"].legal and ways(site)["recompute"].reason.startswith("on demand")
    forced = site_of("lora(rank = 16)", more="strategy = recompute")
    assert (forced.strategy, forced.reason) == ("recompute", "as the spec says")


@pytest.mark.parametrize("strategy", ["fold", "recompute"])
def test_dropout_refuses_what_has_one_product(strategy: str) -> None:
    with pytest.raises(SurgError, match=f"`strategy = {strategy}` is not legal: dropout"):
        site_of("lora(dropout = 0.1)", more=f"strategy = {strategy}")


@pytest.mark.parametrize(("method", "dense"), [
    ("lora()", False), ("dora()", False), ("norm_of()", False), ("full()", False), ("released()", True),
    ("sqft()", True), ("spp()", True), ("hira()", True), ("loha()", False),
])  # fmt: skip
def test_which_branches_form_a_matrix(method: str, dense: bool) -> None:
    plan = plan_of(method, width=256)
    assert branch_is_dense(instance(plan, plan.sites[0].formula), TOKENS) == dense


def test_transforms_are_counted() -> None:
    """A circulant product of n takes two transforms of x and one of its generator, and as many backward."""
    width = 1024
    plan = plan_of("circulant()", width=width)
    (candidate,) = [way for way in plan.sites[0].candidates if way.strategy == "branch"]
    one = 2.5 * width * math.log2(width)
    assert 4 * TOKENS * one <= candidate.flops <= 8 * TOKENS * one


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding", "Conv2d", "Norm"])
def test_every_kind_of_weight_has_costs(kind: str) -> None:
    plan = plan_of("lora()", width=64)
    formula = instance(plan, plan.sites[0].formula)
    for strategy in p4_choose.STRATEGIES:
        cost = measure(formula, strategy, 32, torch.bfloat16, torch.float32, kind)
        assert isinstance(cost, Cost) and cost.bytes > 0


def test_layers_that_differ_in_an_index_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def counted(formula: Any, strategy: str, *rest: Any) -> Cost:
        measured.append(strategy)
        return measure(formula, strategy, *rest)

    monkeypatch.setattr(p4_choose, "measure", counted)
    start = time.perf_counter()
    plan = plan_of("by_layer()", width=32, layers=40)
    assert len(plan.formulas) == 40 and sorted(measured) == sorted(p4_choose.STRATEGIES)
    assert time.perf_counter() - start < 20
