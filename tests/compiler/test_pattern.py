"""Patterns: what each part matches, what is missing, and that no pattern takes long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.compiler import nodes
from surgery.compiler.pattern import matches, parent_patterns, parse_pattern, unmatched

BELOW = ("", ".attn", ".attn.q_proj", ".attn.k_proj", ".mlp.up")
PATHS = [
    "model", "model.norm", "lm_head", "model.layers",
    *(f"model.layers.{n}{rest}" for n in range(12) for rest in BELOW),
]  # fmt: skip


def found(text: str, paths: list[str] = PATHS) -> list[str]:
    parts = parse_pattern(nodes.Pattern(text))
    return [path for path in paths if matches(parts, path)]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("model.norm", 1),
        ("model", 1),
        ("*", 2),
        ("**", len(PATHS)),
        ("model.*", 2),
        ("model.layers.*", 12),
        ("model.layers.**", 1 + 12 * 5),
        ("**.q_proj", 12),
        ("**.*_proj", 24),
        ("model.layers.*.attn.{q_proj,k_proj}", 24),
        ("model.layers.*.{attn,mlp}.*", 36),
        ("model.layers.*.{attn.q_proj,mlp.up}", 24),
        ("model.layers.[8..9].attn", 2),
        ("model.layers.[8..11].mlp.up", 4),
        ("model.layers.[3].attn", 1),
        ("model.layers.1*.attn", 3),  # 1, 10, 11
        ("**.layers.**.up", 12),
        ("model.**.layers.*", 12),  # ** stands for no component too
        ("layers.*", 0),
        ("model.layer", 0),
    ],
)
def test_parts(text: str, count: int) -> None:
    assert len(found(text)) == count


def test_a_star_stays_in_its_component() -> None:
    assert found("model.l*") == ["model.layers"]
    assert found("model*") == ["model"]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("model.layers.*.attn.{q_proj,k_proj}", []),
        ("model.layers.*.attn.{q_proj,o_proj}", ["o_proj"]),
        ("model.layers.[8..11].attn", []),
        ("model.layers.[8..12].attn", ["[12]"]),
        ("model.layers.[8..99].attn", ["[12..99]"]),
        ("{model,body}.layers.*.attn", ["body"]),
    ],
)
def test_what_matches_nothing(text: str, missing: list[str]) -> None:
    assert unmatched(parse_pattern(nodes.Pattern(text)), PATHS) == missing


def test_parents_are_the_longest_first() -> None:
    assert list(parent_patterns("model.{a.b,c}.*.x")) == ["model.{a.b,c}.*", "model.{a.b,c}", "model"]


@pytest.mark.parametrize(
    "text", ["a**", "**a", "a.b**.c", "[5..1]", "[]", "[x]", "[1..99999999999]", "{}", "{,}", "{a"]
)
def test_patterns_without_sense(text: str) -> None:
    with pytest.raises(surgery.SurgError) as raised:
        parse_pattern(nodes.Pattern(text))
    assert [diagnostic.code for diagnostic in raised.value.diagnostics] == ["SURG004"]


simple = st.lists(st.sampled_from(["a", "b", "*", "."]), min_size=1, max_size=8).map("".join)


@given(simple, st.lists(st.sampled_from(["a", "b", "."]), max_size=8).map("".join))
def test_stars_are_those_of_a_regular_expression(text: str, path: str) -> None:
    if "**" in text:
        text = re.sub(r"\*+", "*", text)
    expected = re.fullmatch(re.escape(text).replace(r"\*", "[^.]*"), path) is not None
    assert matches(parse_pattern(nodes.Pattern(text)), path) is expected


@pytest.mark.parametrize("text", ["**.**.**.*a*a*a", "*a" * 200, "**." * 200 + "a", "{*,*a,a*}" * 40, "{**.a,**.b}.**"])
def test_no_pattern_takes_long(text: str) -> None:
    start = time.perf_counter()
    assert found(text, ["a" * 200, ".".join("a" * 100)]) is not None
    assert time.perf_counter() - start < 2
