"""Sums and stacks over ranges: written out at a site, one term with a symbol before; facts of structures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.compiler import nodes, p1_parse
from surgery.compiler.algebra.arguments import bind_arguments
from surgery.compiler.algebra.evaluate import evaluate
from surgery.compiler.algebra.facts import identity_at_start
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.low_rank import factor
from surgery.compiler.algebra.method import elaborate
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.rank import rank_bound
from surgery.compiler.span import Source

SITE = {"in": Quantity.of(6), "out": Quantity.of(6)}
SYMBOLS = {"in": Quantity.symbol("in"), "out": Quantity.symbol("out")}
STACKED = "A = train normal(1.0)[n, 2, in]\nB = train normal(1.0)[n, out, 2]\n"


def formula_of(body: str, parameters: str = "n: int = 3", call: str | None = "m()") -> MethodFormula:
    """The formula of a method: at a site with a call, at symbols without."""
    text = f"method m({parameters}) {{\n{body}\n}}" + (f"\nadapt a {{ with {call} }}" if call else "")
    method, *rules = p1_parse.run(Source("<text>", text)).items
    assert isinstance(method, nodes.Method)
    (clause,) = rules[0].clauses if rules and isinstance(rules[0], nodes.Adapt) else (None,)
    arguments = clause.value if isinstance(clause, nodes.With) else None
    assert arguments is None or isinstance(arguments, nodes.Call)
    made, diagnostics = elaborate(method, bind_arguments(method, arguments), SITE if call else SYMBOLS)
    diagnostics.raise_errors()
    assert made is not None
    return made


def codes_of(body: str, parameters: str = "n: int = 3", call: str | None = "m()") -> list[str]:
    with pytest.raises(surgery.SurgError) as caught:
        formula_of(body, parameters, call)
    return [found.code for found in caught.value.diagnostics]


def values_of(formula: MethodFormula) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        tensor.name: torch.randn(*(length.whole or 0 for length in tensor.shape), generator=generator).double()
        for tensor in formula.tensors
    }


def value_of(formula: MethodFormula, values: dict[str, torch.Tensor]) -> torch.Tensor:
    return evaluate(formula.expression, torch.zeros(6, 6, dtype=torch.float64), values)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_sum_is_that_of_its_terms(count: int) -> None:
    made = formula_of(STACKED + "delta = sum((i + 1) * B[i] @ A[i] for i in 0..n - 1)", call=f"m(n = {count})")
    values = values_of(made)
    expected = sum((i + 1) * values["B"][i] @ values["A"][i] for i in range(count))
    torch.testing.assert_close(value_of(made, values), expected)
    stack = formula_of(STACKED + "delta = hstack(B[i] for i in 0..n-1) @ vstack(A[i] for i in 0..n-1)",
                       call=f"m(n = {count})")  # fmt: skip
    torch.testing.assert_close(value_of(stack, values), sum(values["B"][i] @ values["A"][i] for i in range(count)))


def test_an_empty_sum_is_zero_and_an_empty_stack_an_error() -> None:
    made = formula_of(STACKED + "delta = B[0] @ A[0] + sum(B[i] @ A[i] for i in 1..n - 1)", call="m(n = 1)")
    assert made.expression.operation == "matmul"
    alone = formula_of(STACKED + "delta = 2 * sum(B[i] @ A[i] for i in 1..n - 1)", call="m(n = 1)")
    assert not value_of(alone, values_of(alone)).any()
    assert codes_of(STACKED + "delta = B[0] @ vstack(A[i] for i in 1..n - 1)", call="m(n = 1)") == ["SURG005"]


def test_numbers_are_added() -> None:
    made = formula_of("A = train zeros[out, in]\ns = sum(i * i for i in 1..n)\ndelta = s * A")
    assert made.expression.arguments[0].value == Quantity.of(14)
    symbolic = formula_of("A = train zeros[out, in]\ns = sum(2 for i in 1..n)\ndelta = s * A", call=None)
    assert symbolic.expression.arguments[0].value == Quantity.of(2) * Quantity.symbol("n")
    (product,) = formula_of("s = sum(i for i in 1..n)\ndelta = s * W", call=None).expression.arguments[:1]
    assert str(product.value) == "sum(i for i in 1..n)"


def test_many_terms_are_not_deep() -> None:
    made = formula_of(STACKED + "delta = sum(B[i] @ A[i] for i in 0..n - 1)", call="m(n = 200)")
    assert made.expression.depth < 16


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("delta = sum(W for i in 1..1000000000)", "SURG010"),
        ("s = sum(sum(sum(1 for k in 1..100) for j in 1..100) for i in 1..100)\ndelta = s * W", "SURG010"),
        ("delta = sum(W @ W @ W @ W @ W @ W for i in 1..1000)", "SURG010"),
        (STACKED + "delta = sum(B[i] @ A[i] for i in 0..n)", "SURG026"),
        (STACKED + "delta = sum(B[0][:, 0:n + 1] @ A[0] for i in 0..n)", "SURG026"),
        (STACKED + "delta = sum(A[0][0:i, :] for i in 0..1)", "SURG005"),
        (STACKED + "delta = mean(B[i] @ A[i] for i in 0..n - 1)", "SURG004"),
        (STACKED + "delta = sum(B[A] @ A[A] for A in 0..n - 1)", "SURG009"),
        (STACKED + "delta = sum(B[i] @ A[i] for i in 0..n / 2)", "SURG027"),
        ("delta = sum(W for i in 0..in * 0.3)", "SURG027"),
        ("delta = kron(W, size = 3)", "SURG002"),
        ("delta = mean(axis = 0, W) * W", "SURG004"),
        ("delta = mean(W, axis = 0, axis = 1) * W", "SURG004"),
        ("delta = tile(0, in) @ W", "SURG004"),
        ("delta = selection(W)", "SURG002"),
        ("delta = sum_for(W, 2)", "SURG002"),
    ],
)
def test_mistakes(body: str, code: str) -> None:
    assert codes_of(body) == [code]


def test_a_shape_may_not_depend_on_the_variable() -> None:
    body = "A = train zeros[out, in]\ndelta = sum(A[:, 0:i] for i in 1..n)"
    assert codes_of(body, call=None) == ["SURG005"]


def test_one_term_stands_for_a_symbolic_number_of_them() -> None:
    body = STACKED + "delta = sum(B[i] @ A[i] for i in 0..n - 1)"
    made = formula_of(body, call=None)
    assert rank_bound(made.expression) == Quantity.of(2) * Quantity.symbol("n")
    factors = factor(made.expression)
    assert factors is not None and factors[0].shape == (Quantity.symbol("out"), Quantity.of(2) * Quantity.symbol("n"))
    assert not identity_at_start(made)
    assert identity_at_start(formula_of(body.replace("B = train normal(1.0)", "B = train zeros"), call=None))
    stack = formula_of(STACKED + "delta = hstack(B[i] for i in 1..n) @ vstack(A[i] for i in 1..n)", call=None)
    assert rank_bound(stack.expression) == Quantity.of(2) * Quantity.symbol("n")


# --- facts of methods made of structures ------------------------------------------------------------------------------

FACTS = {  # at symbols: identity at start, rank bound, exports as LoRA
    "circ": ("requires in == out\na = train normal(1.0)[in]\nb = train zeros[in]\ndelta = circ(a * b)", None),
    "toeplitz": ("c = train zeros[out]\nr = train zeros[in]\ndelta = toeplitz(c, r)", None),
    "ldr": ("requires in == out\nc = train zeros[n, in]\ns = train normal(1.0)[n, in]\n"
            "delta = sum(circ(c[i]) @ skewcirc(s[i]) for i in 0..n - 1)", None),
    "kron": ("A = train normal(1.0)[n, in / n]\nB = train zeros[out / n, n]\ndelta = kron(B, A)", "n**2"),
    "mora": ("M = train zeros[n, n]\ndelta = tile(out, n) @ M @ wrap(in, n).T", "n"),
    "melora": ("A = train normal(1.0)[n, 2, in / n]\nB = train zeros[n, out / n, 2]\n"
               "delta = blockdiag(B @ A)", "2 * n"),
    "gralora": ("A = train normal(1.0)[n, n, 4 / n, in / n]\nB = train zeros[n, n, out / n, 4 / n]\n"
                "delta = grid(B @ A)", "4 * n"),
    "loha": ("A = train normal(1.0)[n, in]\nB = train zeros[out, n]\nC = train normal(1.0)[3, in]\n"
             "D = train normal(1.0)[out, 3]\ndelta = 2 * ((B @ A) * (D @ C))", "3 * n"),
    "oft": ("q = train zeros[in / n, n * (n - 1) / 2]\nweight = W @ blockdiag(cayley(skew(q)))", None),
    "oft left": ("q = train zeros[n, out / n * (out / n - 1) / 2]\nweight = blockdiag(cayley(skew(q))) @ W", None),
    "turned": ("E = train eye[n, n]\nF = train eye[in / n, in / n]\nweight = W @ kron(E, F).T", None),
    "scaled": ("l = train ones[out]\nweight = diag(l) @ W @ eye(in)", None),
    "fourier": ("v = train zeros[n]\nidx = frozen choice(in * out)[n]\ndelta = ifft2(scatter(v, idx, out, in))", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_the_start_is_proved_and_the_rank_bound_found(name: str) -> None:
    body, rank = FACTS[name]
    made = formula_of(body, call=None)
    assert identity_at_start(made)
    bound = rank_bound(made.expression)
    assert (None if bound.symbols & {"in", "out"} else str(bound)) == rank
    if rank is not None:
        factors = factor(made.expression)
        assert factors is not None and str(factors[0].shape[-1]) == rank


@pytest.mark.parametrize(
    "body",
    [
        "c = train ones[in]\ndelta = circ(c)",
        "q = train normal(1.0)[in / n, n * (n - 1) / 2]\nweight = W @ blockdiag(cayley(skew(q)))",
        "l = train constant(2)[out]\nweight = diag(l) @ W",
    ],
)
def test_a_start_that_is_none_is_not_proved(body: str) -> None:
    assert not identity_at_start(formula_of(f"requires in == out\n{body}", call=None))


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)


def test_a_whole_step_of_structures_agrees_in_both_strategies() -> None:
    """The recorded graph of a branch and of a fold, and the text that it becomes, make one step alike."""
    method = """
        method mixed(terms: int = 2) {
            requires in == out
            c = train normal(0.5)[terms, in];  s = train normal(0.5)[terms, in];  M = train normal(0.5)[4, 4]
            T = train normal(0.5)[in / 2, 2, 2];    q = train normal(0.5)[in / 2, 1]
            N = train normal(0.5)[in / 2, in / 2]
            V = sum(circ(c[i]) @ skewcirc(s[i]) for i in 0..terms - 1) + tile(out, 4) @ M @ wrap(in, 4).T
            delta = V + blockdiag(T) @ blockdiag(cayley(skew(q))) @ rotary(2, in) + kron(M[0:2, 1:3], N)
        }
    """

    class Loss(_Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = self.second(torch.tanh(self.first(x))).square().mean()
            return loss

    torch.manual_seed(0)
    model = Loss().double()
    batch = {"x": torch.randn(5, 6, dtype=torch.float64)}
    found = []
    for strategy in ("branch", "fold"):
        settings = "step { optimizer = sgd(lr = 0.1)  loss = output  steps = 2 }"
        spec = f"adapt * {{ with mixed\nstrategy = {strategy} }}\n{settings}"
        step = surgery.compile(surgery.parse(method + spec), model, batch)
        for _ in range(2):
            step(batch)
        found.append([step.effective_weight(name) for name in ("first", "second")])
    for one, other in zip(*found, strict=True):
        assert isinstance(one, torch.Tensor) and one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
