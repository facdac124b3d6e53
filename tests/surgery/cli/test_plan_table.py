"""The plan as a table: equal sites are one row, whose pattern could stand in a spec."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from torch import nn

import surgery
from surgery.cli.folded import folded_path
from surgery.cli.plan_table import print_plan
from surgery.cli.plan_text import fold, lists, short_method
from surgery.compiler.plan import (
    Candidate,
    Facts,
    MemoryPlan,
    ModelPlan,
    Place,
    Plan,
    RecomputePlan,
    Site,
    StepPlan,
    Totals,
    WholeParameter,
)

FACTS = Facts(
    identity_at_start=True, rank_bound=8, merges=True, exports_as_lora=True, keeps_zeros=False, moves_base=False,
    needs_dense_weight=False,
)  # fmt: skip
PLACE = Place(file="demo.surg", line=1, column=1, start=0, end=1)


def site(path: str, **changes: Any) -> Site:
    values = {
        "path": path, "parameter": f"{path}.weight", "module_class": "Linear", "kind": "query", "layer": 0,
        "shape": (384, 384), "dtype": "float32", "transposed": False, "bias": True, "rule": 0,
        "formula": "f", "method": "lora(rank = 8)",
        "rank": 8, "tensors": (), "trainable": 6144, "frozen": 0, "strategy": "branch", "reason": "fewer products",
        "facts": FACTS, "place": PLACE,
        "candidates": (
            Candidate(strategy="branch", operation="one", flops=10**9, bytes=10**6, kept=2 * 10**6, legal=True,
                      reason=""),
            Candidate(strategy="fold", flops=0, bytes=0, legal=False, reason="[x @ A.T]"),
        ),
    }  # fmt: skip
    return Site.model_validate(values | changes)


def plan(*sites: Site) -> Plan:
    return Plan(
        spec="", file="demo.surg", sites=sites, formulas={}, tokens=2048,
        model=ModelPlan(source="hub", name="org/tiny", architecture="Tiny", parameters=1000),
        trained=(
            WholeParameter(
                name="classifier.weight", shape=(8, 384), dtype="float32", numbers=3072, lr=5e-3, place=PLACE
            ),
        ),
        totals=Totals(sites=len(sites), trainable=6144 * len(sites) + 3072, frozen=0, model=10**6, share=0.015),
    )  # fmt: skip


def table(plan: Plan, verbose: bool = False, width: int = 220) -> str:
    stream = io.StringIO()
    print_plan(Console(file=stream, width=width), plan, verbose)
    return stream.getvalue()


def test_paths_fold_into_one_pattern() -> None:
    assert folded_path(["a.0.b", "a.1.b", "a.2.b"]) == "a.[0..2].b"
    assert folded_path(["a.1.b", "a.5.b"]) == "a.{1,5}.b"
    assert folded_path(["a.0.e.0.w", "a.0.e.1.w", "a.1.e.0.w", "a.1.e.1.w"]) == "a.[0..1].e.[0..1].w"
    assert folded_path(["a.7.b"]) == "a.7.b"


def test_only_equal_sites_fold() -> None:
    sites = [site(f"layer.{number}.q") for number in range(3)]
    groups = fold([*sites, site("layer.3.q", shape=(1, 2)), site("layer.0.k"), site("layer2.0.q")])
    assert [len(group) for group in groups] == [3, 1, 1, 1]


def test_the_table_has_everything() -> None:
    text = table(plan(*(site(f"encoder.layer.{number}.query") for number in range(6))))
    for words in ("encoder.layer.[0..5].query", "384 x 384", "lora(rank = 8)", "36,864", "rank <= 8", "exports as LoRA",
                  "branch (6 sites): fewer products", "classifier.weight", "8 x 384", "0.005", "1.500%"):  # fmt: skip
        assert words in text
    assert "layer.3" not in text


def test_a_narrow_terminal_keeps_paths_whole() -> None:
    stream = io.StringIO()
    print_plan(Console(file=stream, width=80), plan(*(site(f"encoder.layer.{number}.query") for number in range(6))))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert "encoder.layer.[0..5].query" in lines and max(map(len, lines)) <= 80
    assert "  6 sites 384 x 384: lora, rank 8, 36,864 trained, branch" in lines


def test_verbose_shows_every_site_and_every_way() -> None:
    text = table(plan(*(site(f"encoder.layer.{number}.query") for number in range(6))), verbose=True)
    assert "encoder.layer.3.query" in text
    ways = [" ".join(line.split()) for line in text.splitlines()]
    assert "lora, 384 x 384 (6 sites) branch with one (chosen) 1.000 1.000 2.000 yes fewer products" in ways
    assert "fold no [x @ A.T]" in ways


def test_a_plan_without_sites_prints() -> None:
    assert "classifier.weight" in table(plan())


def test_a_composition_is_named_by_its_parts() -> None:
    assert short_method("mask(W) * lora(rank = 8, alpha = 16) + bitfit()") == "mask(W) * lora + bitfit"


def test_the_sizes_stand_behind_what_is_said_of_the_weight() -> None:
    program = surgery.parse("adapt ** : Linear { with adalora(rank = 2, target = 1) }")
    (said,) = lists(surgery.plan(program, nn.Sequential(nn.Linear(6, 4))))["equations"]
    name, change, penalty = said.split("\n")
    assert name == "adalora:" and change.endswith("@ Q  [4 x 6]") and penalty.endswith(") / 2")


@pytest.mark.parametrize("verbose", [False, True])
def test_a_narrow_terminal_gets_lists_instead_of_broken_tables(verbose: bool) -> None:
    method = "mask(W) * lora(rank = 8, alpha = 16, dropout = 0) + circulant(dropout = 0)"
    said = table(plan(*(site(f"encoder.layer.{number}.q", method=method) for number in range(3))), verbose, 80)
    assert max(map(len, said.splitlines())) <= 80
    assert "mask(W) * lora + circulant, rank 8, " in said
    if verbose:
        way = "branch with one (chosen): 1.000 GFLOP, 1.000 MB moved, 2.000 MB kept: fewer products"
        assert way in " ".join(said.split())
        assert "    fold: not legal: [x @ A.T]" in said


def test_alike_whole_parameters_are_one_row() -> None:
    whole = [
        WholeParameter(name=f"layer.{number}.bias", shape=(8,), dtype="float32", numbers=8, place=PLACE)
        for number in range(3)
    ]
    said = table(plan(site("layer.0.q")).model_copy(update={"trained": tuple(whole)}))
    assert "layer.[0..2].bias" in said and "24" in said


def with_memory(**changes: Any) -> Plan:
    blocks = {f"model.layers.{number}": 3 * 2**30 for number in (1, 3)} | {"model.layers.0": 2**28}
    parts = {
        "weights": 2 * 2**30, "trained": 2**27, "gradients": 2**27, "optimizer": 2**28,
        "kept": sum(blocks.values()), "outputs": 2**30, "backward": 2**29,
    }  # fmt: skip
    memory = MemoryPlan(compiled=False, rows=4, length=2048, peak=sum(parts.values()), blocks=blocks, **parts)
    recompute = RecomputePlan(name="budget", share=0.5)
    step = StepPlan(batch=4, recompute=recompute)
    again = tuple(f"model.layers.{number}" for number in (0, 2, 4, 6))
    return plan(site("a.q")).model_copy(update={"memory": memory, "step": step, "recomputed": again, **changes})


def test_memory_is_one_line_and_each_block_where_it_is_asked_for() -> None:
    said = table(with_memory(), width=400)
    assert (
        "memory: 10.25 GiB at the peak of 4 x 2048, not compiled: weights 2.00, trained 0.12 with gradients 0.12 and "
        "optimizer 0.25, kept by blocks 6.25, around them with logits and loss 1.00, backward 0.50\n" in said
    )
    assert "each" not in said
    assert "recompute: budget(0.5), the backward runs 4 blocks again: model.layers.{0,2,4,6}\n" in said
    verbose = table(with_memory(), verbose=True, width=400)
    assert "  model.layers.{1,3}: 3.00 GiB each\n  model.layers.0: 0.25 GiB\n" in verbose
    assert "--memory" in table(with_memory(memory=None)) and "--memory" not in said
    assert "recompute" not in table(with_memory(recomputed=()))
