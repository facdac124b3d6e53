"""The parser: spans, comments, words that stay usable as names, and errors that say what to write."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.compiler import nodes
from surgery.compiler.diagnostics import SurgError, explain
from surgery.compiler.p1_parse import MAXIMUM_DEPTH, run
from surgery.compiler.span import Source
from tests.conftest import Golden

TESTS = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((TESTS / "examples").glob("*.surg"))
ERRORS = sorted([*(TESTS / "errors").glob("SURG001_*.surg"), *(TESTS / "errors").glob("SURG010_*.surg")])


def parse(text: str) -> nodes.Tree:
    return run(Source("test.surg", text))


def method(body: str) -> nodes.Method:
    (item,) = parse(f"method m() {{\n{body}\n}}").items
    assert isinstance(item, nodes.Method)
    return item


def below(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for field in fields(node):
        value = getattr(node, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, nodes.Node):
                yield from below(part)


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_of_the_language_is_read_and_every_node_knows_its_text(path: Path) -> None:
    tree = run(Source(path.name, path.read_text()))
    for node in below(tree):
        assert node.span is not None
        match node:
            case nodes.Name(name=text) | nodes.Number(text=text):
                assert node.span.text.strip("()") == text
            case nodes.Binary(operator=operator):
                assert node.operator_span is not None and node.operator_span.text == operator
                assert node.left.span and node.right.span
                assert node.left.span.end <= node.operator_span.start < node.right.span.start


def test_a_spec() -> None:
    tree = parse(
        'use "a.surg"\nmodel config "m.json" { task = causal_lm }\n'
        "adapt layers.[0..3].{q, v} : Linear | Conv1D where in >= 8 except **.x { with f(W, r = 8,); expect 12; tie }"
    )
    use, model, adapt = tree.items
    assert use == nodes.Use("a.surg")
    assert model == nodes.Model("config", "m.json", (nodes.Setting("task", nodes.Name("causal_lm")),))
    assert isinstance(adapt, nodes.Adapt)
    assert adapt.pattern.text == "layers.[0..3].{q,v}" and adapt.classes == ("Linear", "Conv1D")
    assert adapt.where == nodes.Binary(">=", nodes.Name("in"), nodes.Number("8"))
    assert adapt.exceptions == (nodes.Pattern("**.x"),)
    call = nodes.Call("f", (nodes.Argument(nodes.Name("W")), nodes.Argument(nodes.Number("8"), "r")))
    assert adapt.clauses == (nodes.With(call), nodes.Expect(12), nodes.Alias("tie"))


def test_a_span_covers_the_parentheses_and_an_operator_has_its_own() -> None:
    (bind,) = method("a = (b + c) * d").statements
    assert isinstance(bind, nodes.Bind) and isinstance(bind.value, nodes.Binary)
    assert bind.span and bind.span.text == "a = (b + c) * d" and str(bind.span) == "test.surg:2:1"
    assert bind.value.left.span and bind.value.left.span.text == "(b + c)"
    assert bind.value.operator_span and bind.value.operator_span.text == "*"


WORDS = [
    "use",
    "model",
    "data",
    "train",
    "freeze",
    "step",
    "adapt",
    "where",
    "except",
    "with",
    "expect",
    "shared",
    "by",
]
WORDS += ["as", "requires", "when", "every", "steps", "reset", "for", "in", "tie", "frozen", "state"]
WORDS += ["after", "before", "at"]


@pytest.mark.parametrize("word", WORDS)
def test_words_of_the_language_are_names_where_names_can_stand(word: str) -> None:
    # Directly behind "=" in a method `train`, `frozen` and `state` begin a tensor; elsewhere they are names too.
    text = f"a = 1 + {word}\n{word} = 2 * {word}\nafter step {{ a = {word}  {word} += {word} }}"
    bind = method(text).statements[1]
    assert isinstance(bind, nodes.Bind) and bind.name == word
    (step,) = parse(f"step {{ a = {word} {word} = f({word} = {word}) }}").items
    assert isinstance(step, nodes.Step) and len(step.settings) == 2


def test_an_interval_insists_on_steps() -> None:
    (event,) = method("every every steps { W += delta;  reset A, B; }").statements
    assert isinstance(event, nodes.Event) and event.interval == nodes.Name("every")
    with pytest.raises(SurgError, match="expected `steps`"):
        method("every 5 epochs { reset A }")


def test_texts_have_escapes() -> None:
    (data,) = parse(r'data "a\n\"b\" \u00e9 {x}" {}').items
    assert isinstance(data, nodes.Data) and data.path == 'a\n"b" é {x}'


# --- comments ---------------------------------------------------------------------------------------------------------


def test_comments_belong_to_what_they_precede() -> None:
    tree = parse(
        """# The source of the method.

# Second group.
method m(a: int,  # about a
         b: int) {  # behind the brace
    # first
    x = f(a,  # inside
          b)  # behind

    # second
    after step { W += x }  # behind the event
    y = x

    # at the end
}  # behind the closing brace

# the end of the file
"""
    )
    (item,) = tree.items
    assert isinstance(item, nodes.Method)
    assert item.comments == ("# The source of the method.", "", "# Second group.", "# about a")
    assert item.trailing == "# behind the brace"
    first, event, last = item.statements
    assert first.comments == ("# first", "# inside") and first.trailing == "# behind"
    assert event.comments == ("", "# second") and event.trailing == "# behind the event"
    assert last.comments == ()
    assert item.closing == ("", "# at the end", "# behind the closing brace")
    assert tree.closing == ("# the end of the file",)


@given(st.data())
def test_no_comment_is_lost_or_doubled_wherever_it_stands(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([path.read_text() for path in EXAMPLES]))
    code = re.sub(r"#[^\n]*", "", text)
    gaps = [
        match.start()
        for match in re.finditer(r"(?<=[\s,(])(?=\S)", re.sub(r'"[^"\n]*"', lambda m: "x" * len(m[0]), code))
    ]
    # A line break inside a pattern in braces is allowed, but not a comment: patterns are one word.
    gaps = [
        gap for gap in gaps if "{" not in re.sub(r".*[\s}]", "", code[:gap].rpartition("\n")[2]) or code[gap - 1] == " "
    ]
    chosen = sorted(data.draw(st.lists(st.sampled_from(gaps), max_size=6, unique=True)), reverse=True)
    for number, gap in enumerate(chosen):
        code = f"{code[:gap]}# note {number}\n{code[gap:]}"
    tree = parse(code)
    found = [
        comment
        for node in below(tree)
        for comment in (*getattr(node, "comments", ()), getattr(node, "trailing", ""), *getattr(node, "closing", ()))
    ]
    assert sorted(filter(None, found)) == sorted(f"# note {number}" for number in range(len(chosen)))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ERRORS, ids=lambda path: path.stem)
def test_errors_say_what_is_wrong_and_what_to_write(path: Path, golden: Golden) -> None:
    with pytest.raises(SurgError) as caught:
        run(Source(path.name, path.read_text()))
    assert {found.code for found in caught.value.diagnostics} == {path.name[:7]}
    golden(str(caught.value).lstrip("\n") + "\n", f"errors/{path.stem}.txt")


def test_errors_of_several_items_are_reported_in_one_go() -> None:
    with pytest.raises(SurgError) as caught:
        parse('model "a" { task causal_lm }\nadapt b { with lora( }\ntrain c\nstep { lr: 3 }\n')
    assert [found.span.line for found in caught.value.diagnostics if found.span] == [1, 2, 4]


def test_the_pages_of_the_codes() -> None:
    assert explain("SURG001").startswith("# SURG001: ")
    assert explain("10") == explain("surg010")
    with pytest.raises(SurgError, match="did you mean `SURG001`"):
        explain("SURG0O1")


# --- any text gives a tree or located errors --------------------------------------------------------------------------


def survives(text: str) -> None:
    started = time.perf_counter()
    try:
        assert isinstance(parse(text), nodes.Tree)
    except SurgError as error:
        assert error.diagnostics
        for found in error.diagnostics:
            assert found.code in ("SURG001", "SURG010") and found.span is not None
            assert 0 <= found.span.start <= found.span.end <= max(1, len(text))
        assert len(str(error)) < 50_000
    assert time.perf_counter() - started < 30


@given(st.text(max_size=200))
def test_random_text(text: str) -> None:
    survives(text)


SIGNS = st.sampled_from([*"(){}[]=,;:.|+-*/%@\"'#\\ \n", "..", "**", "==", "method", "step", "train", "in", "8", "1e5"])


@given(st.lists(SIGNS, max_size=60).map(" ".join), st.lists(SIGNS, max_size=60).map("".join))
def test_random_words(spaced: str, joined: str) -> None:
    survives(spaced)
    survives(joined)


@given(st.data())
def test_mutations_of_what_is_valid(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([path.read_text()[:2000] for path in EXAMPLES]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 12))
        text = text[:start] + data.draw(SIGNS | st.just("")) + text[start + length :]
    survives(text)


def body(expression: str) -> str:
    return f"method m() {{ a = {expression} }}"


@pytest.mark.parametrize(
    "text",
    [
        "a" * 5_000_000,
        "a = 1\n" * 900_000,
        "(" * 1_000_000,
        "step {" * 170_000,
        body("(" * 500_000 + "x" + ")" * 500_000),
        body("[" * 90 + "x" + "]" * 90 + "+ x" * 60_000),
        body("x" + " + x" * 49_000),
        body("-" * 90_000 + "x"),
        body("x" + ".T" * 45_000),
        body("f(" * 1_000 + "x" + ")" * 1_000),
        'model "' + "\\" * 1_000_000,
        "adapt {" + "a," * 500_000,
        "adapt x { " + ("with" + " " * 1_000) * 1_000 + "}",
        "#" * 1_000_000,
        body("1" * 1_000_000),
        body("1e" + "9" * 5_000),
        f"adapt a {{ expect {'1' * 5_000} }}",
        "use a\n" * 100_000,
        "x" * 1_000_000,
        "step { " + "x" * 1_000_000 + " 3 }",
        "\0" * 1_000,
        "\ud800",
    ],
    ids=range(22),
)
def test_large_and_deep_texts(text: str) -> None:
    survives(text)


def test_what_is_deep_but_allowed() -> None:
    depth = MAXIMUM_DEPTH - 2
    assert parse(body("(" * depth + "x" + ")" * depth)) == parse(body("x"))
    assert parse(body("-" * depth + "x")).items
