"""The printer: what it prints parses to the same tree, and printing again changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given

from surgery.compiler import nodes
from surgery.compiler.p1_parse import run
from surgery.compiler.printer import show
from surgery.compiler.span import Source
from tests.strategies import expressions, trees

ROOT = Path(__file__).resolve().parent.parent.parent
TEXTS = sorted(
    [
        *(ROOT / "tests" / "examples").glob("*.surg"),
        *(ROOT / "specs").glob("*.surg"),
        *ROOT.glob("surgery/methods/*.surg"),
    ]
)


def parse(text: str) -> nodes.Tree:
    return run(Source("test.surg", text))


def value(text: str) -> nodes.Expr:
    (method,) = parse(f"method m() {{ a = {text} }}").items
    assert isinstance(method, nodes.Method) and isinstance(method.statements[0], nodes.Bind)
    return method.statements[0].value


@given(trees)
def test_what_is_printed_parses_to_the_same_tree(tree: nodes.Tree) -> None:
    text = show(tree)
    again = parse(text)
    assert again == tree
    assert show(again) == text


@given(expressions)
def test_an_expression_is_one_line_that_parses_to_the_same_expression(expression: nodes.Expr) -> None:
    text = show(expression)
    assert "\n" not in text
    assert value(f"({text})") == expression


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_texts_keep_their_meaning_and_their_comments(path: Path) -> None:
    text = path.read_text()
    tree = parse(text)
    printed = show(tree)
    assert parse(printed) == tree
    assert show(parse(printed)) == printed
    assert sorted(comments(printed)) == sorted(comments(text))
    assert all(len(line) <= 120 for line in printed.splitlines() if "#" not in line and "=" not in line)


def comments(text: str) -> list[str]:
    return [line[line.index("#") :].rstrip() for line in text.splitlines() if "#" in line]


@pytest.mark.parametrize(
    "text",
    [
        "(alpha / rank) * B @ A",
        "alpha * B @ A",
        "A @ (B @ C)",
        "a - (b - c)",
        "a or (b and c)",
        "(a or b) and c",
        "not (a or b)",
        "not a == b",
        "(not a) == b",
        "-x ** 2",
        "(-x) ** 2",
        "x ** -y ** 2",
        "(x ** y) ** 2",
        "(A + B).T[0:out, :]",
        "(a < b) == c",
        "W[:, None]",
        "sum(circ(c[i]) for i in 0..terms - 1)",
        "lora(rank = 8, dropout = 0.1).A",
        r'"a \"quoted\" text\nwith é and \\"',
    ],
)
def test_these_are_printed_as_they_are_written(text: str) -> None:
    assert show(value(text)) == text


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("((W)) + ((A @ B))", "W + A @ B"),
        ("a / b * c", "(a / b) * c"),
        ("a or b and c", "a or (b and c)"),
        ("f( x,y = 2,)", "f(x, y = 2)"),
        ("[ 1,2, ]", "[1, 2]"),
        ("x . T", "x.T"),
    ],
)
def test_one_form_for_all_spellings(text: str, printed: str) -> None:
    assert show(value(text)) == printed


def test_smaller_nodes_print_on_one_line() -> None:
    (method,) = parse(
        "method m(rank: int = 8) {  # header\n  # about A\n  A = train zeros[rank, in] shared by kind as k "
        "{ lr = 1, decay = 0 }\n\n  every 5 steps when step > 3 {\n    W += A # why\n    reset A, B\n  }\n}"
    ).items
    assert isinstance(method, nodes.Method)
    tensor, event = method.statements
    assert show(tensor) == "A = train zeros[rank, in] shared by kind as k { lr = 1, decay = 0 }"
    assert show(event) == "every 5 steps when step > 3 { W += A; reset A, B }"
    assert show(method.parameters[0]) == "rank: int = 8"


def test_a_short_block_is_one_line_and_a_long_header_is_wrapped() -> None:
    many = ", ".join(f"parameter_{index}: int = {index}" for index in range(8))
    text = show(parse(f"train classifier {{\n lr = 5e-3\n}}\nmethod long({many}) {{ delta = W }}"))
    assert text.startswith("train classifier { lr = 5e-3 }\n\nmethod long(parameter_0: int = 0,")
    assert max(map(len, text.splitlines())) <= 120
    assert "\n            parameter_" in text


def test_a_value_that_begins_with_a_role_gets_parentheses() -> None:
    bind = nodes.Bind("a", nodes.Binary("*", nodes.Name("state"), nodes.Number("2")))
    assert show(bind) == "a = (state * 2)"


def test_an_empty_tree_is_an_empty_text() -> None:
    assert show(nodes.Tree()) == ""
    assert parse("") == nodes.Tree()
