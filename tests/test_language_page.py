"""docs/language.md against the compiler: every name is on the page, every name on the page is known, and what the
page calls not built yet is what the compiler answers so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import surgery
from surgery.compiler.algebra.in_time import IN_TIME, NOISE
from surgery.compiler.algebra.measured import OPTIONS
from surgery.compiler.algebra.names import COORDINATES, MEASURED, STARTS
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.schedule import SCHEDULES
from surgery.compiler.algebra.sources import SOURCES
from surgery.compiler.algebra.structures import STRUCTURES
from surgery.compiler.data_settings import DATA, TEMPLATES
from surgery.compiler.p2_check import RULE_SETTINGS
from surgery.compiler.settings import MODEL, TASKS, TRAIN
from surgery.compiler.step_settings import SCORES, STEP
from surgery.optimizers import OPTIMIZERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "language.md").read_text()
BUILT, LATER = PAGE.split("## Not built yet\n")
MODEL_LINE = f'model config "{ROOT}/specs/configs/tiny_llama.json" {{ task = causal_lm }}\n'

RULE = "adapt model.layers.*.self_attn.q_proj { with mine() }"

SETTINGS = {name for readers in (MODEL, STEP, DATA, TRAIN, RULE_SETTINGS) for name in readers}
FUNCTIONS = {name for name, kind in STRUCTURES.items() if not kind.internal} | Quantity.FUNCTIONS.keys() | SOURCES
SPECIAL = {"dropout", "previous", "prev", "where", *IN_TIME, *SCHEDULES, *NOISE, *MEASURED}
CALLED = {
    *OPTIMIZERS,
    "every",
    "random",
    "budget",
    "patience",
    "wandb",
    "trackio",
    *(one.name for one in surgery.methods()),
}
OWN = {"my_dora", "pruned", "noisy"}  # the page's own examples


def code(text: str) -> str:
    """What a page sets as code: blocks, and the spans between backticks."""
    blocks = re.findall(r"^```surg\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(blocks + re.findall(r"`([^`]+)`", prose))


def test_every_name_of_the_language_is_on_the_page() -> None:
    of_optimizers = {argument for kind in OPTIMIZERS.values() for argument in kind.arguments}
    options = {name for words in OPTIONS.values() for name in words} | OPTIONS.keys()
    known = {
        *COORDINATES,
        *STARTS,
        *FUNCTIONS,
        *SPECIAL,
        *TASKS,
        *SETTINGS,
        *SCORES,
        *OPTIMIZERS,
        *of_optimizers,
        *options,
    }
    assert known - set(re.findall(r"\w+", code(BUILT))) == set()
    assert set(TEMPLATES) <= set(lists("chatml"))


def test_every_function_on_the_page_is_known() -> None:
    called = set(re.findall(r"(?<![\w.])([a-z_]\w*)\(", code(BUILT)))
    known = FUNCTIONS | SPECIAL | STARTS.keys() | TASKS.keys() | CALLED | OWN | {"constant", "cosine", "linear"}
    assert called - known == set()


def lists(*words: str) -> list[str]:
    """The names in the page's code spans that begin so (regular expressions); each span is a list of names."""
    prose = " ".join(PAGE.split())
    return [name for word in words for name in re.search(rf"`({word}[^`]*)`", prose)[1].split()]  # type: ignore[index]


def test_listed_starts_functions_and_coordinates_are_known() -> None:
    starts = [re.sub(r"\(.*", "", name) for name in lists("zeros ones")]
    assert set(starts) <= STARTS.keys()
    functions = [re.sub(r"\(.*", "", name) for name in lists("mask\\(W\\) stop", "mean sum")]
    assert set(functions) - {"gradient)"} <= FUNCTIONS  # the second argument of `surrogate(value, gradient)`
    assert set(lists("max_in max_out")) <= COORDINATES


METHOD = "A = train zeros[rank, in]\n B = train zeros[out, rank]\n delta = B @ A\n"
NOT_YET: dict[str, tuple[str, ...]] = {  # what the page says, and texts of it
    "`previous` of `y`": ("b = train zeros[out]\n output = y + b * previous(y)",),
    "of itself": (METHOD.replace("B @ A", "previous(previous(B @ A))"),),
    "what reads a coordinate of its block": ("C = train zeros[layers, out, in]\n delta = previous(C[layer])",),
    "`prev` of `prev`": (METHOD + "after step { W += prev(prev(delta)) }",),
    "a change of a shared tensor": (
        METHOD.replace("zeros[rank, in]", "zeros[rank, in] shared by model") + "after step { A += A }",
    ),
    "`at start` over an earlier block": (METHOD + "at start { W -= previous(B @ A) }",),
}


@pytest.mark.parametrize("phrase", NOT_YET)
def test_what_is_not_built_yet_says_so(phrase: str) -> None:
    assert phrase in " ".join(LATER.split())
    for text in NOT_YET[phrase]:
        spec = text
        if "zeros" in text:
            spec = f"method mine(rank: int = 4) {{ {text} }}\n{MODEL_LINE}{RULE}"
        with pytest.raises(surgery.SurgError) as raised:
            surgery.plan(surgery.parse(spec))
        assert [found.code for found in raised.value.diagnostics if found.severity == "error"] == ["SURG008"], (
            raised.value
        )
