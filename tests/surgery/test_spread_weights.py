"""Two processes in module scope: what is whole on each of them, and when; what a step takes as `surgery plan` says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.compiler.built_again import built_again
from surgery.compiler.memory_spread import of_processes
from surgery.runtime.models import load_skeleton
from tests.held import KEPT, LENGTH, Found, held
from tests.processes import LINEAR, LITERAL

WEIGHTS = {(64, 64), (176, 64)}
STEP = "optimizer = adamw(lr = 1e-3)  batch = 4  micro_batch = 1"


def spec(method: str, more: str = "", rules: str = "") -> str:
    return f"""
model "llama" {{ task = causal_lm  dtype = float32 }}
adapt {LINEAR} {{ with {method} }}
{rules}
step {{ {STEP} {more} }}
"""


SPECS = {
    "lora": spec("lora(rank = 2)"),
    "dora": spec("dora(rank = 2)"),
    "dora, blocks again": spec("dora(rank = 2)", "recompute = blocks"),
    "masked": spec("sqft(rank = 2)"),
    "masked, dropout": spec("sqft(rank = 2, dropout = 0.1)"),
    "rotated": spec("oft(block = 8)"),
    "literal": spec(LITERAL, rules="train model.norm"),
}
# Lowered as a branch, whose product under a mask is counted as if it were kept.
NOT_PLANNED = {"masked, dropout"}
FORM = ("dora", "masked")  # methods that form a matrix of W's size


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Found]]]:
    folder = tmp_path_factory.mktemp("spread")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=100, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    texts = SPECS | {name + KEPT: SPECS[name] for name in FORM}
    return folder, held(folder, texts, WEIGHTS)


@pytest.mark.parametrize("name", SPECS)
def test_nothing_of_a_weights_size_waits_for_the_backward(
    found: tuple[Path, dict[str, list[Found]]], name: str
) -> None:
    """Neither W nor what a method forms of it is whole outside of its block's forward and backward."""
    for process in found[1][name]:
        assert process.between == []


@pytest.mark.parametrize("name", FORM)
def test_what_a_method_forms_would_wait(found: tuple[Path, dict[str, list[Found]]], name: str) -> None:
    """So it is found, and as much as all adapted weights of a whole model."""
    for process in found[1][name + KEPT]:
        assert len(process.between) >= 2 * 4 * 7 - 7  # two micro-batches of four blocks; the first one's x is frozen


@pytest.mark.parametrize("name", [name for name in SPECS if name not in NOT_PLANNED])
def test_the_peak_is_the_planned_one(found: tuple[Path, dict[str, list[Found]]], name: str) -> None:
    folder, processes = found
    plan = surgery.plan(surgery.parse(SPECS[name], folder))
    plan = plan.model_copy(update={"tokens": LENGTH})
    planned = of_processes(plan, load_skeleton(plan.model, folder, meta=True), 2, "module")
    assert (planned.rows, planned.length) == (1, LENGTH)
    for process in processes[name]:
        assert 0.95 < planned.peak / process.peak < 1.15, (planned, process.peak)


def test_which_sites_are_built_again(tmp_path: Path) -> None:
    """Only those that keep a matrix, and not where the whole block runs again."""

    def again(text: str, dtype: str = "float32") -> int:
        program = surgery.parse(text.replace('"llama"', 'config "configs/tiny_llama.json"').replace("float32", dtype),
                                Path(__file__).parents[2] / "specs")  # fmt: skip
        return len(built_again(surgery.plan(program)))

    assert [again(SPECS[name]) for name in ("lora", "dora", "dora, blocks again", "masked")] == [0, 14, 0, 14]
    assert again(SPECS["masked, dropout"]) == 14
    assert again(SPECS["dora"], "bfloat16") == 0  # a branch with the norms by parts
    assert again(spec("dora(rank = 2)", "recompute = budget(0.5)")) == 7
