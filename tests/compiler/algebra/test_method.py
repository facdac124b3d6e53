"""Methods at symbolic sizes: their facts, their parameters, and every mistake in them with its place."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import surgery
from surgery.compiler import nodes, p1_parse
from surgery.compiler.library import library
from surgery.compiler.p2_check import check_method
from surgery.compiler.span import Source

LOW_RANK = "A = train kaiming_uniform[rank, in]\nB = train zeros[out, rank]\n"

# identity at start, rank bound, exports as LoRA, moves W, needs a dense W, keeps W's zeros
FACTS: dict[str, tuple[bool, str | None, bool, bool, bool, bool]] = {
    "asymmetry": (True, "rank", True, False, False, False),
    "delta_lora": (True, "rank", True, True, False, False),
    "dora": (True, None, False, False, True, False),
    "fourierft": (False, None, False, False, False, False),
    "gralora": (True, "k * rank", True, False, False, False),
    "hira": (True, None, False, False, True, True),
    "kasa": (False, None, False, False, False, False),
    "loha": (True, "rank**2", True, False, False, False),
    "lokr": (True, "factor * rank", True, False, False, False),
    "lora": (True, "rank", True, False, False, False),
    "lora_fa": (True, "rank", True, False, False, False),
    "oft": (True, None, False, False, False, False),
    "psoft": (True, "rank", True, False, False, False),
    "randlora": (True, None, False, False, False, False),
    "rslora": (True, "rank", True, False, False, False),
    "vera": (True, "rank", True, False, False, False),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_the_library(name: str) -> None:
    (info,) = (info for info in surgery.methods() if info.name == name)
    assert FACTS[name] == (
        info.identity_at_start, info.rank_bound, info.exports_as_lora, info.moves_base, info.needs_dense_weight,
        info.keeps_zeros,
    )  # fmt: skip
    assert info.merges and not info.needs_calibration


@pytest.mark.parametrize("name", library())
def test_a_method_of_the_library_is_printed_as_it_is(name: str) -> None:
    (info,) = (info for info in surgery.methods() if info.name == name)
    assert not info.source.startswith("#")
    assert any(part.startswith(("delta = ", "weight = ", "output = ")) for part in info.equation.split("; "))
    assert p1_parse.run(Source(name, info.text)).items == (library()[name],)


def facts(body: str) -> dict[str, Any]:
    """What is proved of a method at a site of 8 x 6."""
    text = f"method m(rank: int = 2) {{\n{body}\n}}\nadapt 0 {{ with m }}"
    (site,) = surgery.plan(surgery.parse(text), nn.Sequential(nn.Linear(6, 8))).sites
    return dict(site.facts.model_dump())


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        (f"{LOW_RANK}delta = B @ A", "identity_at_start", True),
        (f"{LOW_RANK}delta = (B + 1) @ A", "identity_at_start", False),
        (f"{LOW_RANK}weight = W + B @ A", "identity_at_start", True),
        (f"{LOW_RANK}weight = W * 2 + B @ A", "identity_at_start", False),
        ("s = train ones[out]\nweight = diag(s) @ W", "identity_at_start", True),
        ("s = train zeros[out]\nweight = diag(s) @ W", "identity_at_start", False),
        ("A = train normal(1.0)[out, in]\ndelta = A - A", "identity_at_start", True),
        (f"{LOW_RANK}delta = B @ A + B @ A", "rank_bound", 4),
        (f"{LOW_RANK}delta = (B @ A) * (B @ A)", "rank_bound", 4),
        (f"{LOW_RANK}delta = 3 * B @ A", "rank_bound", 2),
        (f"{LOW_RANK}delta = B @ A @ W.T @ W", "rank_bound", 2),
        (f"{LOW_RANK}delta = exp(B @ A)", "rank_bound", None),
        ("A = train zeros[out, in]\ndelta = A", "rank_bound", None),
        (f"{LOW_RANK}delta = B @ A + B @ A", "exports_as_lora", True),
        (f"{LOW_RANK}delta = B @ A + stop(B @ A)", "exports_as_lora", True),
        (f"{LOW_RANK}weight = W + B @ A", "exports_as_lora", False),
        (f"{LOW_RANK}delta = mask(W) * (B @ A)", "keeps_zeros", True),
        (f"{LOW_RANK}delta = mask(W) * (B @ A) + B @ A", "keeps_zeros", False),
        ("s = train zeros[out]\ndelta = diag(s) @ W", "keeps_zeros", True),
        ("s = train zeros[out]\ndelta = diag(s) @ W", "needs_dense_weight", False),
        ("s = train zeros[out]\ndelta = s[:, None] * W", "needs_dense_weight", True),
        (f"{LOW_RANK}delta = mask(W) * (B @ A)", "needs_dense_weight", True),
        (f"{LOW_RANK}s = train ones[out, 1]\ndelta = s * (B @ A)", "needs_dense_weight", False),
        (f"{LOW_RANK}delta = B @ A\nafter step {{ A *= 0.9 }}", "moves_base", False),
        (f"{LOW_RANK}delta = B @ A\nafter step {{ W += delta }}", "moves_base", True),
        (f"{LOW_RANK}delta = B @ A\nafter step {{ W += delta }}", "exports_as_lora", False),
        (f"{LOW_RANK}delta = B @ A\nafter step {{ W += rank * (delta - prev(delta)) }}", "exports_as_lora", True),
        (f"{LOW_RANK}delta = B @ A\nafter step {{ W += step * (delta - prev(delta)) }}", "exports_as_lora", False),
    ],
)
def test_facts_by_induction(body: str, name: str, value: object) -> None:
    assert facts(body)[name] == value


def problems(body: str, parameters: str = "rank: int = 2") -> list[tuple[str, str]]:
    """Codes and the text that each underlines, from a method alone."""
    tree = p1_parse.run(Source("m.surg", f"method m({parameters}) {{\n{body}\n}}"))
    (method,) = tree.items
    assert isinstance(method, nodes.Method)
    return [(found.code, found.span.text if found.span else "") for found in check_method(method).found]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (f"{LOW_RANK}delta = A @ B", [("SURG005", "@")]),
        (f"{LOW_RANK}delta = B @ A + A", [("SURG005", "+")]),
        (f"{LOW_RANK}delta = B @ B", [("SURG005", "@")]),
        (f"{LOW_RANK}delta = B @ C", [("SURG002", "C")]),
        (f"{LOW_RANK}delta = foo(B) @ A", [("SURG002", "foo(B)")]),
        (f"{LOW_RANK}delta = B @ A\nweight = W", [("SURG006", "weight = W")]),
        (LOW_RANK, [("SURG006", "")]),
        ("W = train zeros[out]\ndelta = W\nafter step { W *= 2 }", [("SURG003", "W = train zeros[out]")]),
        ("in = train zeros[out]\ndelta = W", [("SURG003", "in = train zeros[out]")]),
        ("diag = train zeros[out]\ndelta = W", [("SURG003", "diag = train zeros[out]")]),
        ("A_before = train zeros[out]\ndelta = W", [("SURG003", "A_before = train zeros[out]")]),
        ("half = train zeros[out]\ndelta = W", [("SURG003", "half = train zeros[out]")]),
        ("None = train zeros[out]\ndelta = W", [("SURG003", "None = train zeros[out]")]),
        ("self = train zeros[out]\ndelta = W", [("SURG003", "self = train zeros[out]")]),
        (
            "a = train zeros[out] shared by model as lambda\ndelta = W",
            [("SURG003", "a = train zeros[out] shared by model as lambda")],
        ),
        (
            "a = train zeros[out] shared by model as half\ndelta = W",
            [("SURG003", "a = train zeros[out] shared by model as half")],
        ),
        (f"{LOW_RANK}A = train zeros[in]\ndelta = B @ A", [("SURG009", "A = train zeros[in]")]),
        ("A = train zeros\ndelta = W", [("SURG004", "zeros")]),
        ("A = train zero[in]\ndelta = W", [("SURG002", "zero")]),
        ("A = train zeros(1)[in]\ndelta = W", [("SURG004", "zeros(1)")]),
        ("A = train normal(mean = 1)[in]\ndelta = W", [("SURG002", "mean = 1")]),
        ("A = train normal(-1)[in]\ndelta = W", [("SURG004", "normal(-1)")]),
        ("A = train eye[in]\ndelta = W", [("SURG005", "eye[in]")]),
        ("A = train W[in, out]\ndelta = W", [("SURG005", "W[in, out]")]),
        ("A = train circ(1)[in]\ndelta = W", [("SURG005", "circ(1)")]),
        ("A = train zeros[in] shared by rows\ndelta = W", [("SURG002", "A = train zeros[in] shared by rows")]),
        ("A = train zeros[in] { rate = 1 }\ndelta = W", [("SURG002", "rate = 1")]),
        ("A = train zeros[in] { lr = 1, lr = 2 }\ndelta = W", [("SURG009", "lr = 2")]),
        ("A = train zeros[in] { lr = 0 }\ndelta = W", [("SURG004", "0")]),
        ("output = y\ndelta = W", [("SURG006", "delta = W")]),
        ("output = y\ninput = dropout(x, 0.5)", [("SURG006", "output = y")]),
        ("output = y.T", [("SURG005", "y.T")]),
        ("output = W @ x.T", [("SURG005", "W @ x.T")]),
        ("output = W[0, :]", [("SURG005", "W[0, :]")]),
        ("output = y * y[0:1, :]", [("SURG004", "y[0:1, :]")]),
        ("output = mean(y) * y", [("SURG004", "mean(y)")]),
        ("delta = y", [("SURG004", "y")]),
        ("input = W\ndelta = W", [("SURG005", "W")]),
        ("input = y\ndelta = W", [("SURG004", "y")]),
        ("input = dropout(x, 2)\ndelta = W", [("SURG004", "2")]),
        ("delta = W\nafter step { W = W @ W }", [("SURG005", "@")]),
        ("delta = W\nafter step { V += W }", [("SURG007", "V += W")]),
        ("A = frozen zeros[in]\ndelta = W\nafter step { A *= 2 }", [("SURG007", "A *= 2")]),
        ("A = train zeros[in] shared by model\ndelta = W\nafter step { A *= 2 }", [("SURG008", "A *= 2")]),
        ("delta = W\nafter step { W += prev(prev(delta)) }", [("SURG008", "prev(prev(delta))")]),
        ("delta = prev(W)", [("SURG004", "prev(W)")]),
        ("delta = x", [("SURG004", "x")]),
        ("A = train constant(training)[in]\ndelta = A * W", [("SURG004", "training")]),
        ("A = train constant(step)[in]\ndelta = A * W", [("SURG004", "step")]),
        ("A = train zeros[in]\ndelta = A * W\nafter step { A *= training }", [("SURG004", "training")]),
        ("delta = gaussian(step) * W", [("SURG004", "gaussian(step)")]),
        ("delta = gaussian(step)[:, in] * W", [("SURG005", "gaussian(step)[:, in]")]),
        ("delta = bernoulli(step, 2)[out, in] * W", [("SURG004", "2")]),
        ("delta = bernoulli(step)[out, in] * W", [("SURG004", "bernoulli(step)")]),
        ("requires in\ndelta = W", [("SURG004", "in")]),
        ("delta = W\nbefore step { W *= 2 }", [("SURG002", "before step { W *= 2 }")]),
        ("delta = W\nevery 0 steps { W *= 2 }", [("SURG004", "0")]),
        ("delta = W\nevery 2.5 steps { W *= 2 }", [("SURG027", "2.5")]),
        ("delta = W\nafter step { reset W }", [("SURG007", "reset W")]),
        ("A = frozen zeros[in]\ndelta = W\nafter step { reset A }", [("SURG007", "reset A")]),
        (
            "U = train left_singular(W, 2)[out, 2]\ndelta = U @ U.T @ W\nafter step { reset U }",
            [("SURG007", "reset U")],
        ),
        ("A = train zeros[in]\ndelta = A * W\nbefore forward { A = grad(A) }", [("SURG004", "grad(A)")]),
        ("A = frozen zeros[in]\ns = state zeros[in]\ndelta = A * W\nafter step { s = grad(A) }", [("SURG004", "A")]),
        ("s = state zeros[in]\ndelta = s * W\nafter step { s = ema(s, 1) }", [("SURG004", "1")]),
        ("s = state zeros[in]\ndelta = s * W\nafter step { s = quantile(s, 2) * s }", [("SURG004", "2")]),
        ("s = state zeros[in]\ndelta = ema(s, 0.5) * W", [("SURG004", "ema(s, 0.5)")]),
        ("s = state constant(cosine_up(1, 2))[in]\ndelta = s * W", [("SURG004", "cosine_up(1, 2)")]),
        ("A_grad = train zeros[in]\ndelta = A_grad * W", [("SURG003", "A_grad = train zeros[in]")]),
        # a name whose definition failed is one mistake, not one per use
        ("n = foo\nm = n + 1\nA = train zeros[m, in]\ndelta = A.T @ A", [("SURG002", "foo")]),
    ],
)
def test_mistakes_are_found_where_they_are(body: str, expected: list[tuple[str, str]]) -> None:
    found = problems(body)
    assert [code for code, _ in found] == [code for code, _ in expected]
    for (_, text), (_, wanted) in zip(found, expected, strict=True):
        assert text == wanted or not wanted


def test_all_mistakes_are_collected() -> None:
    body = "A = train zero[in]\nB = train zeros[foo]\nC = train zeros[in] { rate = 1 }\ndelta = W.T"
    assert [code for code, _ in problems(body)] == ["SURG002", "SURG002", "SURG002", "SURG005"]


def test_a_square_requirement_makes_both_sides_one() -> None:
    body = "A = train zeros[in, in]\ndelta = A"
    assert [code for code, _ in problems(body)] == ["SURG005"]
    assert problems(f"requires in == out\n{body}") == []


# --- parameters -------------------------------------------------------------------------------------------------------

PARAMETERS = 'rank: int, scale: real = 2 * rank, name: text = "a", flag: bool = false'


def arguments(call: str, parameters: str = PARAMETERS) -> dict[str, object]:
    text = f"method m({parameters}) {{\ndelta = W\n}}\nadapt ** {{ with m({call}) }}"
    return dict(surgery.parse(text).rules[0].arguments)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("rank = 4", {"rank": 4, "scale": 8, "name": "a", "flag": False}),
        ("4", {"rank": 4, "scale": 8, "name": "a", "flag": False}),
        ("4, 0.5", {"rank": 4, "scale": 0.5, "name": "a", "flag": False}),
        ('4, flag = true, name = "b"', {"rank": 4, "scale": 8, "name": "b", "flag": True}),
        ("2.0 * 3, scale = 1 / 4", {"rank": 6, "scale": 0.25, "name": "a", "flag": False}),
        ("4, rank / 2", {"rank": 4, "scale": 2, "name": "a", "flag": False}),
    ],
)
def test_arguments(call: str, expected: dict[str, object]) -> None:
    assert arguments(call) == expected


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("", "SURG004"),
        ("rank = 0.5", "SURG004"),
        ('rank = "4"', "SURG004"),
        ("4, name = 3", "SURG004"),
        ("4, flag = 1", "SURG004"),
        ("4, scale = true", "SURG004"),
        ("4, ranks = 2", "SURG002"),
        ("4, rank = 2", "SURG009"),
        ('1, 2, "a", true, 5', "SURG004"),
        ("rank = in", "SURG002"),
        ("rank = 0", "SURG026"),
    ],
)
def test_arguments_of_the_wrong_kind(call: str, code: str) -> None:
    with pytest.raises(surgery.SurgError) as raised:
        arguments(call)
    assert [diagnostic.code for diagnostic in raised.value.diagnostics] == [code]
    assert all(diagnostic.span is not None for diagnostic in raised.value.diagnostics)


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ("rank: int = 1, rank: int = 2", "SURG009"),
        ("rank: whole = 1", "SURG004"),
        ("in: int = 1", "SURG003"),
        ("delta: int = 1", "SURG003"),
    ],
)
def test_parameters_that_cannot_be(parameters: str, code: str) -> None:
    assert code in [found for found, _ in problems("weight = W", parameters)]
