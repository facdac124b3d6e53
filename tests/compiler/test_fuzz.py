"""Any text gives a program and a plan, or `SurgError` with places: never another exception, a hang or much memory."""

from __future__ import annotations

import random
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "tests" / "examples").glob("*.surg"), *(ROOT / "specs").glob("*.surg")])
TOKEN = re.compile(r'"[^"\n]*"|\w+|\s+|[^\w\s]')
ODD = (
    "0", "-1", "1e308", "1e999", "9 ** 9 ** 9", "10 ** 12", "1 / 0", "0.5", "NaN", "inf", '"text"', "true", "[1, 2]",
    "in", "out", "W", "x", "y", "step", "steps", "rank", "delta", "prev(delta)", "prev(W)", "W.T", "A[0:1, :]", "None",
    "heads", "layer", "sum(A for i in 0..9)", "lambda", "класс", "ﬁ", "\u200b", "٣", "*", "**", "{", "}", "[", "]", "(",
    ")", "@", ".", "..", "[5..1]", "[0..999999999]", "**.**.**.*a*a*a", "untie", "tie", "except **", ": Linear",
    "where in / 0 == 1", "where kind < 3", "shared by kind", "shared by model as rule0", "{ lr = -1 }", "sqrt(0 - 1)",
    "exp(1000)", "stop", "mask(W)", "diag(A)", "row_norm(W)", "method m() { weight = W }", "use \"/dev/zero\"", "\\",
)  # fmt: skip
SECONDS = 5.0


@cache
def tiny() -> nn.Module:
    """The smallest Llama, on the meta device."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def survives(text: str) -> str:
    """What the text comes to: "plan", or the codes of its errors."""
    start = time.perf_counter()
    try:
        plan = surgery.plan(surgery.parse(text, folder=ROOT / "specs"), tiny())
        assert type(plan).model_validate_json(plan.model_dump_json()) == plan
        found = "plan"
    except surgery.SurgError as error:
        assert error.diagnostics
        assert all(re.fullmatch(r"SURG\d{3}", diagnostic.code) for diagnostic in error.diagnostics)
        unplaced = [diagnostic for diagnostic in error.diagnostics if diagnostic.span is None]
        assert not unplaced, str(error)
        assert str(error)
        found = " ".join(sorted({diagnostic.code for diagnostic in error.diagnostics}))
    assert time.perf_counter() - start < SECONDS, text
    return found


def mutated(text: str, chance: random.Random) -> str:
    """The text with a few changes: tokens swapped, deleted, doubled, replaced; lines doubled or moved."""
    for _ in range(chance.randint(1, 3)):
        tokens = TOKEN.findall(text)
        solid = [index for index, token in enumerate(tokens) if not token.isspace()]
        if not solid:
            return text
        first, second = chance.choice(solid), chance.choice(solid)
        lines = text.splitlines(keepends=True)
        match chance.randint(0, 6):
            case 0:
                tokens[first], tokens[second] = tokens[second], tokens[first]
            case 1:
                tokens[first] = ""
            case 2:
                tokens[first] = f"{tokens[first]} {tokens[first]}"
            case 3 | 4:
                tokens[first] = chance.choice(ODD)
            case 5:
                lines.insert(chance.randrange(len(lines)), chance.choice(lines))
                tokens = lines
            case _:
                del lines[chance.randrange(len(lines))]
                tokens = lines
        text = "".join(tokens)
    return text


# The specs with their patterns made to fit the tiny model, so that changed ones come as far as a plan.
def fitted(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"adapt [^{\n:]*(\{[^}\n]*\}[^{\n:]*)?(: Linear )?\{", "adapt **.{q_proj,v_proj} {", text)
    text = re.sub(r"^train classifier", "train model.norm", text, flags=re.MULTILINE)
    return re.sub(r"expect \d+", "expect 4", text)


def test_the_specs_come_as_far_as_a_plan() -> None:
    plans = [path.stem for path in FILES if survives(fitted(path)) == "plan"]
    assert len(plans) >= 8


@settings(max_examples=150)
@given(st.sampled_from(FILES), st.booleans(), st.integers(0, 2**32))
def test_changed_specs(path: Path, fits: bool, seed: int) -> None:
    survives(mutated(fitted(path) if fits else path.read_text(encoding="utf-8"), random.Random(seed)))


@given(st.lists(st.sampled_from(ODD) | st.text(max_size=5), max_size=12).map(" ".join))
def test_soup(text: str) -> None:
    survives(text)
    survives(f"adapt **.q_proj {{ with lora(rank = {text}) }}")
    survives(f"method m() {{ A = train zeros[out, in]\n n = {text}\n delta = A }}\nadapt **.q_proj {{ with m }}")


@given(st.lists(st.sampled_from(["*", "**", ".", "{", "}", ",", "[", "]", "0", "1", "..", "a", "q_proj"]), max_size=14))
def test_patterns_of_any_shape(parts: list[str]) -> None:
    survives(f"adapt {''.join(parts)} {{ with lora(rank = 2) }}")


LOW_RANK = "A = train zeros[rank, in]\nB = train zeros[out, rank]\n"


def method(body: str, parameters: str = "rank: int = 4", call: str = "") -> str:
    return f"method m({parameters}) {{\n{body}\n}}\nadapt model.layers.*.self_attn.q_proj {{ with m({call}) }}\n"


CASES: dict[str, tuple[str, str]] = {
    "a tower of powers": ("SURG004", method(f"n = 9 ** 9 ** 9\n{LOW_RANK}delta = n * B @ A")),
    "a float too large": ("SURG004", method(f"n = 1e399\n{LOW_RANK}delta = n * B @ A")),
    "an exponent too large": ("SURG010", method(f"n = 1e999\n{LOW_RANK}delta = n * B @ A")),
    "a huge tensor": (
        "SURG010",
        method("A = train zeros[10 ** 12, in]\nB = train zeros[out, 10 ** 12]\ndelta = B @ A"),
    ),
    "sizes that overflow": ("SURG010", method("A = train zeros[10 ** 18, 10 ** 18, 10 ** 18]\ndelta = W")),
    "a size beyond all": ("SURG004", method("A = train zeros[1e30, in]\ndelta = W")),
    "a huge product": (
        "SURG010",
        method("A = train zeros[10 ** 10, 1]\nB = train zeros[1, 10 ** 10]\ndelta = (A @ B)[0:out, 0:in]"),
    ),
    "no rank": ("SURG026", method(f"{LOW_RANK}delta = B @ A", call="rank = 0")),
    "a negative rank": ("SURG026", method(f"{LOW_RANK}delta = B @ A", call="rank = -3")),
    "no size": ("SURG004", method("A = train zeros[k, in]\nB = train zeros[out, k]\ndelta = B @ A", "k: int = 0")),
    "division by zero": ("SURG004", method(f"{LOW_RANK}delta = (1 / (rank - 4)) * B @ A")),
    "a matrix by zero": ("SURG004", method(f"{LOW_RANK}delta = B @ A / 0")),
    "a remainder by zero": ("SURG004", method(f"{LOW_RANK}delta = (in % (rank - 4)) * B @ A")),
    "a name by itself": ("SURG002", method(f"n = n + 1\n{LOW_RANK}delta = n * B @ A")),
    "a default by itself": ("SURG002", method(f"{LOW_RANK}delta = B @ A", "rank: int = rank")),
    "a comprehension": ("SURG010", method(f"{LOW_RANK}delta = sum(B @ A for i in 0..10 ** 9)")),
    "a text for a number": ("SURG004", method(f"{LOW_RANK}delta = B @ A", call='rank = "four"')),
    "an unknown kind": ("SURG004", method(f"{LOW_RANK}delta = B @ A", "rank: shape = 4")),
    "a name doubled line by line": (
        "SURG010",
        method(LOW_RANK + "C0 = B @ A\n" + "".join(f"C{n + 1} = C{n} + C{n}\n" for n in range(40)) + "delta = C40"),
    ),
    "a number doubled line by line": (
        "SURG004",
        method("a0 = sqrt(in)\n" + "".join(f"a{n + 1} = sqrt(a{n} + a{n} ** 0.5)\n" for n in range(60)) + "delta = W"),
    ),
    "names within names": (
        "SURG010",
        method(
            LOW_RANK + "C0 = B @ A\n" + "".join(f"C{n + 1} = C{n} + B @ A\n" for n in range(2000)) + "delta = C2000"
        ),
    ),
    "brackets": ("SURG010", method("n = " + "(" * 200 + "in" + ")" * 200 + "\ndelta = W")),
    "too many terms": (
        "SURG004",
        method("n = " + " * ".join(["(in + out + rank + layers + sites + slots + max_in)"] * 20) + "\ndelta = W"),
    ),
    "a clock to the power of itself": (
        "SURG004",
        method(f"{LOW_RANK}delta = B @ A\nafter step when step ** step > 3 {{ W += delta }}"),
    ),
    "a clock that divides": (
        "SURG004",
        method(f"{LOW_RANK}delta = B @ A\nafter step when 1 / step > 0.1 {{ W += delta }}"),
    ),
    "stars without end": ("SURG020", "adapt **.**.**.*a*a*a { with lora }"),
    "many stars": ("SURG020", f"adapt {'*a' * 300} {{ with lora }}"),
    "many alternatives": ("SURG020 SURG021", f"adapt {'{*,*a,b*}' * 40} {{ with lora }}"),
    "a range without end": ("SURG021", "adapt model.layers.[0..999999999].self_attn.q_proj { with lora }"),
    "a batch beyond all": ("SURG004", "adapt **.q_proj { with lora }\nstep { batch = 10 ** 18 }"),
    "a condition on nothing": ("SURG004", "adapt **.q_proj where in / 0 == 1 { with lora }"),
    "a file without end": ("SURG011", 'use "/dev/zero"\nadapt **.q_proj { with lora }'),
    "a name of a file that is none": ("SURG011", f'use "{"a" * 5000}"\nadapt **.q_proj {{ with lora }}'),
    "nothing": ("SURG020", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_what_could_exhaust_the_machine(name: str) -> None:
    codes, text = CASES[name]
    assert set(survives(text).split()) & set(codes.split())


@pytest.mark.parametrize("name", ["class", "lambda", "None", "self", "torch", "F", "training_", "_", "A1", "weights"])
def test_names_of_python_are_names(name: str) -> None:
    body = f"{name} = train zeros[rank, in]\nB = train zeros[out, rank]\ndelta = B @ {name}"
    assert survives(method(body)) in ("plan", "SURG001", "SURG003")


def test_a_plan_of_many_tokens_has_finite_costs() -> None:
    data = 'data "x.jsonl" { text = a  max_length = 2147483647 }'
    text = f"adapt **.q_proj {{ with lora }}\nstep {{ batch = 2147483647 }}\n{data}"
    plan: Any = surgery.plan(surgery.parse(text), tiny())
    assert all(0 <= candidate.flops < 2**63 for candidate in plan.sites[0].candidates)
