"""Hypothesis strategies for whole `.surg` trees in canonical form: anything that a text can say, comments included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import strategies as st

from surgery.compiler import nodes

L = TypeVar("L", bound=nodes.Line)

# Words of the language are fine as names wherever a name can stand; only these five are reserved everywhere.
RESERVED = ("and", "or", "not", "true", "false", "True", "False")
WORDS = (
    "W",
    "A",
    "B",
    "in",
    "out",
    "rank",
    "steps",
    "step",
    "train",
    "state",
    "shared",
    "when",
    "for",
    "every",
    "with",
)
names = st.one_of(
    st.sampled_from(WORDS),
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True).filter(lambda n: n not in RESERVED),
)
fields = names.filter(lambda name: name != "T")  # `.T` is a transpose
printable = st.characters(codec="utf-8", exclude_characters="\r")
texts = st.text(printable.filter(lambda c: c in "\n\t" or ord(c) >= 32 and ord(c) != 127), max_size=12)
comment_texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12)
comments = comment_texts.map(lambda text: ("# " + text).rstrip())
numbers = st.sampled_from(["0", "1", "8", "2.0", "1.", "1e-4", "5E+2", "007", "3.5e1"]).map(nodes.Number)

component = st.sampled_from(["layer", "*", "**", "0", "{query,value}", "[8..15]", "q_*", "*_proj", "{a.b,c}", "x[0,3]"])
patterns = st.lists(component, min_size=1, max_size=4).map(lambda parts: nodes.Pattern(".".join(parts)))

BINARY = ("+", "-", "*", "/", "//", "%", "@", "**", "==", "!=", "<=", ">=", "<", ">", "and", "or")


def _compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arguments = st.builds(nodes.Argument, inner, st.none() | names)
    comprehension = st.builds(nodes.Comprehension, inner, names, inner, inner)
    slices = st.builds(nodes.Slice, st.none() | inner, st.none() | inner)
    return st.one_of(
        st.builds(nodes.Unary, st.sampled_from(["-", "not"]), inner),
        st.builds(nodes.Binary, st.sampled_from(BINARY), inner, inner),
        st.builds(nodes.Transpose, inner),
        st.builds(nodes.Field, inner, fields),
        st.builds(nodes.Call, names, st.lists(arguments, max_size=3).map(tuple)),
        st.builds(nodes.Call, names, comprehension.map(lambda node: (nodes.Argument(node),))),
        st.builds(nodes.Subscript, inner, st.lists(inner | slices, min_size=1, max_size=3).map(tuple)),
        st.builds(nodes.ListOf, st.lists(inner, max_size=3).map(tuple)),
    )


leaves = st.one_of(numbers, names.map(nodes.Name), texts.map(nodes.String), st.booleans().map(nodes.Boolean))
expressions: st.SearchStrategy[Any] = st.recursive(leaves, _compound, max_leaves=8)


def leading(empty_line_first: bool) -> st.SearchStrategy[tuple[str, ...]]:
    """Comments above a line: groups with one empty line between them, at the start only where a line is above."""
    lines = st.lists(st.one_of(comments, st.just("")), max_size=3).map(tuple)

    def canonical(found: tuple[str, ...]) -> tuple[str, ...]:
        kept: list[str] = []
        for line in found:
            if line or (kept[-1] if kept else empty_line_first):
                kept.append(line)
        return tuple(kept)

    return st.one_of(st.just(()), lines.map(canonical))


@st.composite
def blocks(draw: st.DrawFn, elements: st.SearchStrategy[Any], *, items: bool = False) -> dict[str, Any]:
    """Lines of a block with their comments, and the closing comments, as `elements` and `closing`."""
    lines = draw(st.lists(elements, max_size=3))
    given = []
    for index, line in enumerate(lines):
        above = draw(leading(index > 0 and not items))
        behind = draw(st.just("") | comments)
        given.append(replace(line, comments=above, trailing=behind))
    closing = draw(leading(bool(given) and not items))
    while closing and closing[-1] == "":
        closing = closing[:-1]
    return {"elements": tuple(given), "closing": closing}


def with_block(build: Any, elements: st.SearchStrategy[Any], *header: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Nodes that end with a block; `build` takes the header's values and the block's lines."""
    parts = st.tuples(*header)
    return st.builds(
        lambda values, block: replace(build(*values, block["elements"]), closing=block["closing"]),
        parts,
        blocks(elements),
    )


options = st.builds(nodes.Setting, names, expressions)
tensors = st.builds(
    lambda name, role, start, shared, own: nodes.Tensor(name, role, start, shared[0], shared[1], own),
    names,
    st.sampled_from(["train", "frozen", "state"]),
    expressions,
    st.tuples(st.none(), st.none()) | st.tuples(names, st.none() | names),
    st.lists(options, max_size=2).map(tuple),
)
changes = st.one_of(
    st.builds(nodes.Change, names, st.sampled_from(["=", "+=", "-=", "*="]), expressions),
    st.builds(nodes.Reset, st.lists(names, min_size=1, max_size=2).map(tuple)),
)
events = st.one_of(
    with_block(
        nodes.Event, changes, st.sampled_from(["after", "before", "at"]), names, st.none(), st.none() | expressions
    ),
    with_block(nodes.Event, changes, st.just("every"), st.just("steps"), expressions, st.none() | expressions),
)
statements = st.one_of(
    tensors, st.builds(nodes.Bind, names, expressions), st.builds(nodes.Require, expressions), events
)
parameters = st.lists(st.builds(nodes.Parameter, names, names, st.none() | expressions), max_size=3).map(tuple)
clauses = st.one_of(
    st.builds(nodes.With, expressions),
    st.builds(nodes.Expect, st.integers(0, 10**6)),
    st.builds(nodes.Alias, st.sampled_from(["tie", "untie"])),
    options,
)
trains = with_block(nodes.Train, options, patterns)
freezes = st.builds(nodes.Freeze, patterns)
items = st.one_of(
    st.builds(nodes.Use, texts),
    with_block(nodes.Model, options, st.sampled_from(["hub", "config", "python"]), texts),
    with_block(
        nodes.Adapt,
        clauses,
        patterns,
        st.lists(names, max_size=2).map(tuple),
        st.none() | expressions,
        st.lists(patterns, max_size=2).map(tuple),
    ),
    trains,
    freezes,
    with_block(nodes.Step, options | trains | freezes),
    with_block(nodes.Data, options, texts),
    with_block(nodes.Method, statements, names, parameters),
)
trees = blocks(items, items=True).map(lambda block: nodes.Tree(block["elements"], block["closing"]))
