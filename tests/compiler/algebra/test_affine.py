"""Affine outputs: the weight and bias that are derived, against the function itself at the unit vectors, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.compiler import nodes, p1_parse
from surgery.compiler.algebra.affine import BIAS, NotAffine, effective, why_not_folded, why_not_merged
from surgery.compiler.algebra.arguments import bind_arguments
from surgery.compiler.algebra.evaluate import evaluate
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.method import elaborate
from surgery.compiler.algebra.proved import prove
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.rows import Rows
from surgery.compiler.span import Source

IN, OUT = 5, 3


def formula(body: str, inputs: int = IN, outputs: int = OUT) -> MethodFormula:
    (method,) = p1_parse.run(Source("<text>", f"method m(rank: int = 2) {{ {body} }}")).items
    assert isinstance(method, nodes.Method)
    sizes = {"in": Quantity.of(inputs), "out": Quantity.of(outputs)}
    found, problems = elaborate(method, bind_arguments(method, nodes.Call("m")), sizes)
    problems.raise_errors()
    assert found is not None
    return found


def values(found: MethodFormula) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {tensor.name: [size.whole or 0 for size in tensor.shape] for tensor in found.tensors}
    drawn = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    sides = [size.whole or 0 for size in found.shape]
    drawn["W"] = torch.randn(*sides, generator=generator, dtype=torch.float64)
    return drawn | {BIAS: torch.randn(sides[0], generator=generator, dtype=torch.float64)}


def derived(found: MethodFormula, known: dict[str, Tensor], biased: bool = True) -> tuple[Tensor, Tensor]:
    """The weight and the bias by the proof."""
    result = effective(found, biased)
    weight = evaluate(result.weight(found.shape[0]), known["W"], known)
    offset = torch.zeros(found.shape[0].whole or 0, dtype=torch.float64)
    return weight, offset if result.offset is None else evaluate(result.offset, known["W"], known).expand_as(offset)


V = "v = train zeros[out];  c = train zeros[out]"
AFFINE = {
    f"{V};  output = v * y + c": lambda x, y, t: t["v"] * y + t["c"],
    f"{V};  output = (y - c) / v": lambda x, y, t: (y - t["c"]) / t["v"],
    f"{V};  output = c - 2 * y * v": lambda x, y, t: t["c"] - 2 * y * t["v"],
    f"{V};  output = 0.5 * (y + dropout(y, 0.5)) - stop(c)": lambda x, y, t: y - t["c"],
    f"{V};  output = -y @ (diag(v) + c[:, None])": lambda x, y, t: -y @ (torch.diag(t["v"]) + t["c"][:, None]),
    "A = train zeros[rank, in];  B = train zeros[out, rank];  output = y + (x @ A.T) @ B.T": (
        lambda x, y, t: y + x @ t["A"].T @ t["B"].T
    ),
    "A = train zeros[out, in];  output = x @ (A + W).T": lambda x, y, t: x @ (t["A"] + t["W"]).T,
    "M = train zeros[out, rank];  output = y + (y[:, 0:2] + 1) @ M.T[0:2, :]": (
        lambda x, y, t: y + (y[:, 0:2] + 1) @ t["M"].T[0:2, :]
    ),
    "A = train zeros[out, in];  s = train zeros[in];  delta = A;  input = (x - s) * s / 2": (
        lambda x, y, t: y + (x - t["s"]) * t["s"] / 2 @ t["A"].T
    ),
    "A = train zeros[out, in];  s = train zeros[in];  weight = A;  input = x + s": (
        lambda x, y, t: y + (x + t["s"]) @ (t["A"] - t["W"]).T
    ),
    "M = train zeros[in, in];  A = train zeros[out, in];  delta = A;  input = x + x @ M": (
        lambda x, y, t: y + (x + x @ t["M"]) @ t["A"].T
    ),
}  # fmt: skip


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("body", AFFINE)
def test_the_derived_weight_and_bias_compute_the_same(body: str, biased: bool) -> None:
    found = formula(body)
    assert prove(found).merges and not why_not_merged(found)
    known = values(found)
    x = torch.randn(4, IN, dtype=torch.float64)
    y = F.linear(x, known["W"], known[BIAS] if biased else None)
    weight, offset = derived(found, known, biased)
    torch.testing.assert_close(F.linear(x, weight, offset), AFFINE[body](x, y, known), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("output = gelu(y)", "`gelu` of an activation is not linear in x"),
        ("output = y * y", "a product of two activations is not linear in x"),
        ("v = train zeros[out];  output = v / y", "`/` by an activation is not linear in x"),
        ("output = y ** 2", "`power` of an activation is not linear in x"),
        ("output = y + softmax(y)", "`softmax` of an activation is not linear in x"),
        ("A = train zeros[out, in];  delta = A;  input = relu(x)", "`relu` of an activation is not linear in x"),
        ("v = train zeros[out];  output = y[:, 0:1] * v", "an activation of one column is spread over several"),
    ],
)
def test_what_is_not_affine_says_why(body: str, reason: str) -> None:
    found = formula(body)
    facts = prove(found)
    assert (facts.merges, facts.merge_reason) == (False, reason)
    with pytest.raises(NotAffine):
        effective(found)


def test_facts_of_outputs() -> None:
    hadamard = prove(formula("w = train ones[out];  b = train zeros[out];  output = w * y + b"))
    assert hadamard.identity_at_start and hadamard.keeps_zeros and not hadamard.exports_as_lora
    circulant = "a = train normal(1.0)[out];  b = train zeros[out];  output = y + gelu(y @ circ(a * b).T)"
    assert prove(formula(circulant)).identity_at_start
    assert not prove(formula("w = train ones[out];  output = exp(w) * y")).identity_at_start
    assert not prove(formula("output = dropout(y, 0.5)")).identity_at_start
    assert formula("output = 2 * y").reads_only_y
    assert not formula("A = train zeros[out, in];  output = y + x @ A.T").reads_only_y
    assert not formula("output = y @ (W @ W.T)").reads_only_y


def test_what_can_be_folded() -> None:
    lora = "A = train zeros[rank, in];  B = train zeros[out, rank];  delta = B @ A"
    assert why_not_folded(formula(lora)) == ""
    assert why_not_folded(formula(f"{lora};  input = dropout(x, 0)")) == ""
    assert "dropout" in why_not_folded(formula(f"{lora};  input = dropout(x, 0.5)"))
    assert "not x itself" in why_not_folded(formula(f"{lora};  input = 2 * x"))
    assert prove(formula(f"{lora};  input = dropout(x, 0.5)")).exports_as_lora
    assert not prove(formula(f"{lora};  input = 2 * x")).exports_as_lora


def test_rows_stop_their_gradient() -> None:
    found = formula("v = train zeros[out];  output = v * stop(y) + stop(v * y)")
    y, v = (torch.randn(2, OUT, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def value(node: Expression) -> torch.Tensor:
        return evaluate(node, torch.zeros(OUT, IN), {"v": v})

    rows = Rows({"y": y}, value, lambda left, matrix: left @ value(matrix), True)
    rows(found.expression).sum().backward()
    assert y.grad is None and v.grad is not None
    torch.testing.assert_close(v.grad, y.detach())
