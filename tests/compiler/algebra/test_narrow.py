"""The narrow part of a change of W: what it is, that it is all of the change, and that one operation runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.compiler.algebra import branch
from surgery.compiler.algebra.base import Base, Lookup
from surgery.compiler.algebra.branch import FUSED
from surgery.compiler.algebra.evaluate import evaluate
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.lower import Adaptation
from surgery.compiler.algebra.narrow import narrow, summands
from surgery.compiler.algebra.quantity import whole_of
from surgery.compiler.kernels.low_rank import low_rank_linear

OUT, IN, ROWS = 12, 10, 7
TENSORS = "A = train normal(1.0)[2, in];  B = train normal(1.0)[out, 2];  C = train normal(1.0)[2, 2]\n"
# an equation, the width of its narrow part (None: it has none) and how many summands stay beside it
EQUATIONS: dict[str, tuple[int | None, int]] = {
    "delta = 3 * B @ A": (2, 0),
    "delta = -(B @ A) / 4": (2, 0),
    "delta = stop(Q) @ (0.5 * A)": (2, 0),
    "delta = B @ C @ A": (2, 0),
    "delta = diag(b) @ B @ diag(d) @ A": (2, 0),
    "delta = (B @ A) * a": (2, 0),
    "delta = (B @ A).T.T": (2, 0),
    "delta = 2 * B @ A - F @ E": (5, 0),
    "delta = s * (B @ A + F @ E)": (5, 0),
    "delta = (B @ A) * (B @ A)": (4, 0),
    "delta = B @ A @ W.T @ W": (2, 0),
    "delta = B @ A + D": (2, 1),
    "delta = 2 * (D - B @ A)": (2, 1),
    "delta = diag(b) @ (D + B @ A + F @ E)": (5, 1),
    "delta = B @ A + F @ E + G @ H": (5, 1),  # all three would be as wide as the input
    "delta = D": (None, 0),
    "delta = D @ G2": (None, 0),  # as wide as the input
    "delta = diag(b) @ D": (None, 0),
    "weight = W + B @ A": (2, 0),
    "weight = W - F @ E + 2 * B @ diag(d) @ A": (5, 0),
    "weight = diag(b) @ (W + B @ A)": (2, 1),  # beside it: diag(b - 1) @ W
    "weight = diag(b / stop(row_norm(W + B @ A))) @ (W + B @ A)": (2, 1),
    "weight = W @ diag(a)": (None, 0),
}
METHOD = f"""
method m(share: real = 0) {{
    {TENSORS}
    Q = frozen normal(1.0)[out, 2]
    E = train normal(1.0)[3, in];  F = train normal(1.0)[out, 3];  D = train normal(1.0)[out, in]
    G = train normal(1.0)[out, 6]; H = train normal(1.0)[6, in];  G2 = train normal(1.0)[in, in]
    a = train normal(1.0)[in];  b = train normal(1.0)[out];  d = train normal(1.0)[2];  s = train normal(1.0)[1]
    BODY
    input = dropout(x, share)
}}
adapt layer {{ with m(share = SHARE) }}
step {{ optimizer = adamw(lr = 1e-3)  batch = 2  steps = 1  loss = mse }}
"""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def formula_of(body: str, share: float = 0.0) -> MethodFormula:
    """The formula of one equation at a site of 12 x 10, over those of the tensors that it reads."""
    words = set(body.replace("(", " ").replace(")", " ").replace(".", " ").replace(",", " ").split())
    lines = []
    for line in METHOD.split("\n"):
        parts = line.split(";") if "normal(1.0)" in line else [line]
        lines.append(";".join(part for part in parts if "normal(1.0)" not in part or part.split()[0] in words))
    text = "\n".join(lines).replace("BODY", body).replace("SHARE", str(share))
    plan = surgery.plan(surgery.parse(text), Model())
    return instance(plan, plan.sites[0].formula)


def values_of(formula: MethodFormula) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {tensor.name: tuple(map(whole_of, tensor.shape)) for tensor in formula.tensors}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("body", EQUATIONS)
def test_the_narrow_part_and_the_rest_are_the_change(body: str) -> None:
    formula = formula_of(body)
    (term,) = formula.terms
    change = formula.change(term.matrix)
    width, beside = EQUATIONS[body]
    found = narrow(change)
    if width is None:
        assert found is None
        return
    assert found is not None and len(found.rest) == beside
    assert whole_of(found.left.shape[1]) == whole_of(found.right.shape[0]) == width
    weight, values = torch.randn(OUT, IN, dtype=torch.float64), values_of(formula)
    left, right, *rest = (evaluate(part, weight, values) for part in (found.left, found.right, *found.rest))
    expected = evaluate(change, weight, values)
    torch.testing.assert_close(found.scale * left @ right + sum(rest), expected, rtol=1e-11, atol=1e-11)


def test_numbers_go_into_the_scale_and_tensors_stay_as_they_are_stored() -> None:
    formula = formula_of("delta = (3 / 4) * stop(Q) @ (-2 * A)")
    found = narrow(formula.expression)
    assert found is not None and found.scale == -1.5
    assert (found.left.operation, found.left.arguments[0].name) == ("stop", "Q")
    assert (found.right.operation, found.right.name) == ("tensor", "A")


def test_a_weight_and_its_opposite_cancel() -> None:
    formula = formula_of("weight = W + 2 * B @ A - W + W")
    assert [part.operation for part in summands(formula.expression)].count("weight") == 1
    assert all("weight" not in str(part.operation) for part in summands(formula.change(formula.expression)))


# --- one operation ----------------------------------------------------------------------------------------------------


def adapted(formula: MethodFormula, operation: str, transposed: bool, biased: bool) -> tuple[list[Tensor], list[Any]]:
    """The output and all gradients on the same random numbers, and the calls of the operation."""
    generator = torch.Generator().manual_seed(5)
    weight, x, bias, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((OUT, IN), (ROWS, IN), (OUT,), (ROWS, OUT))
    )
    values, calls = values_of(formula), []
    x.requires_grad_()
    bias.requires_grad_()

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append((arguments, named))
        return low_rank_linear(*arguments, **named)

    dtypes = dict.fromkeys(values, torch.float64)
    run = Adaptation(formula, "branch", ROWS, torch.float64, dtypes, operation=operation)
    base = Base(weight.T.contiguous() if transposed else weight, transposed, torch.float64)
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "low_rank_linear", counted)
        y = run(x, base, bias if biased else None, values, True)
    leaves = [x, *([bias] if biased else []), *values.values()]
    return [y, *torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)], calls


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("body", EQUATIONS)
def test_one_operation_equals_plain_torch(body: str, biased: bool, transposed: bool, share: float) -> None:
    """The same dropout mask, the same gradients; where something is narrow the operation runs, exactly once."""
    formula = formula_of(body, share)
    expected, none = adapted(formula, "", transposed, biased)
    found, calls = adapted(formula, FUSED, transposed, biased)
    assert not none and len(calls) == (EQUATIONS[body][0] is not None)
    for ours, theirs in zip(found, expected, strict=True):
        bound = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11 * bound)
    if calls:
        ((_, named),) = calls
        assert ("narrow" in named) == (share > 0)
        assert named["weights"][0].shape == (OUT, IN)


def test_a_stored_factor_is_handed_over_itself() -> None:
    """No copy and no cast: the operation casts what it needs, and the gradient goes straight to the tensor."""
    formula = formula_of("delta = 2 * B @ A")
    values = {name: value.detach().float().requires_grad_() for name, value in values_of(formula).items()}
    handed: list[Any] = []

    def watched(x: Tensor, **named: Any) -> Any:
        handed.append(named)
        return low_rank_linear(x, **named)

    run = Adaptation(formula, "branch", ROWS, torch.bfloat16, dict.fromkeys(values, torch.float32), operation=FUSED)
    weight = torch.randn(OUT, IN, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "low_rank_linear", watched)
        y = run(torch.randn(ROWS, IN, dtype=torch.bfloat16), Base(weight, False, torch.bfloat16), None, values, True)
    assert y.dtype == torch.bfloat16
    assert handed[0]["lefts"][0] is values["B"] and handed[0]["rights"][0] is values["A"]
    assert handed[0]["scales"] == [2.0] and handed[0]["weights"][0] is weight


def test_a_lookup_stays_plain() -> None:
    """Its x are numbers of rows: nothing is multiplied with W there."""
    formula = formula_of("delta = 2 * B @ A")
    values = values_of(formula)
    table, tokens = torch.randn(IN, OUT, dtype=torch.float64), torch.tensor([1, 0, 9])
    run = Adaptation(formula, "branch", 3, torch.float64, dict.fromkeys(values, torch.float64), operation=FUSED)
    found = run(tokens, Lookup(table, True, torch.float64, IN), None, values, True)
    torch.testing.assert_close(found, (table + 2 * (values["B"] @ values["A"]).T)[tokens])
