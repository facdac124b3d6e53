"""Events as programs of the step: their condition, what they keep, and what they do to a site's tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.compiler.event_program import EventProgram, Move
from surgery.compiler.events import programs
from surgery.compiler.kernels.moved_weights import add_products
from surgery.compiler.plan import Plan

LOW_RANK = "A = train normal(1.0)[rank, in]\nB = train normal(1.0)[out, rank]\ndelta = 2 * B @ A\n"


class Two(nn.Module):
    """Two linears of different sizes."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4, dtype=dtype)
        self.second = nn.Linear(4, 3, dtype=dtype)


def planned(
    event: str, rule: str = "", pattern: str = "first", extra: str = "", dtype: torch.dtype = torch.float64
) -> Plan:
    text = f"method m(rank: int = 2, start: int = 3) {{\n{LOW_RANK}{extra}\n{event}\n}}\n"
    return surgery.plan(surgery.parse(f"{text}adapt {pattern} {{ with m()  {rule} }}", name="m.surg"), Two(dtype))


def run(program: EventProgram, **tensors: torch.Tensor) -> None:
    names = [str(node.target) for node in program.graph.nodes if node.op == "placeholder"]
    results = fx.GraphModule(nn.Module(), program.graph)(*(tensors[name] for name in names))
    if move := program.move:
        left, right, *before = results
        add_products(
            [tensors["W"]], [left], [right], move.scale, sources=[tensors[move.source]], transposed=move.transposed,
            before=([before[0]], [before[1]]) if before else None,
        )  # fmt: skip


def at(program: EventProgram, **clock: int) -> bool:
    return bool(eval(program.condition, {"__builtins__": {}}, dict(clock)))


DELTA_LORA = "after step when step > start { W += 0.5 * (delta - prev(delta)) }"


def test_the_literal_reading_moves_w_by_the_change() -> None:
    (program,) = programs(planned(DELTA_LORA, "update = literal"))
    assert program.phase == "after step" and set(program.kept) == {"first.A", "first.B"}
    assert program.comment.startswith("m.surg:6: after step when step > start")
    assert [at(program, step=step, steps=9) for step in (3, 4, 5)] == [False, True, True]
    own = {"W": "first.weight", "A": "first.A", "B": "first.B"}
    assert program.sites == (own | {"A_before": "first.A.before", "B_before": "first.B.before"},)
    torch.manual_seed(0)
    old, new = ({"A": torch.randn(2, 5).double(), "B": torch.randn(4, 2).double()} for _ in range(2))
    weight = torch.randn(4, 5).double()
    moved = weight.clone()
    run(program, W=moved, **new, A_before=old["A"], B_before=old["B"])
    expected = weight + 0.5 * (2 * new["B"] @ new["A"] - 2 * old["B"] @ old["A"])
    torch.testing.assert_close(moved, expected)
    assert program.move == Move(1.0, "W", transposed=False)
    assert not any(node.op.startswith("call") for node in program.graph.nodes), "the factors are read as they are"


def test_the_telescope_keeps_the_start_of_the_sum() -> None:
    plan = planned(DELTA_LORA, "update = telescope")
    (program,) = programs(plan)
    assert program.phase == "start" and "W" not in program.sites[0]
    assert [at(program, step=step, steps=9) for step in (0, 3, 4, 5)] == [False, False, True, False]
    tensors = {name: torch.ones(2) * n for n, name in enumerate(("A", "B"))}
    state = {name: torch.zeros(2) for name in ("A_start", "B_start")}
    switch = torch.zeros(())
    run(program, **tensors, **state, telescope=switch)
    assert float(switch) == 0.5 and torch.equal(state["B_start"], tensors["B"])
    roles = {tensor.name: tensor.role for tensor in plan.sites[0].tensors}
    assert roles == {"A": "train", "B": "train", "A_start": "state", "B_start": "state", "telescope": "state"}


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        ("", [0]),
        ("when true", [0]),
        ("when step >= 4", [4]),
        ("when 3 < step", [4]),
        ("when step > 2 or step > 5", [3]),
        ("when step > 2 and step > 5", [6]),
    ],
)
def test_the_snapshot_is_taken_once(when: str, steps: list[int]) -> None:
    (program,) = programs(planned(f"after step {when} {{ W += delta - prev(delta) }}", "update = telescope"))
    assert [step for step in range(12) if at(program, step=step, steps=12)] == steps


def test_several_statements_run_in_the_order_of_the_file() -> None:
    event = "after step when step % 2 == 0 { s = s + 1\n A *= 0.5 }\nafter step { W *= 0.9 }"
    found = programs(planned(event, extra="s = state zeros[rank]"))
    assert [program.condition for program in found] == ["(step % 2) == 0", "True"]
    s, a, w = torch.zeros(2), torch.ones(2, 5), torch.ones(4, 5)
    run(found[0], s=s, A=a)
    run(found[1], W=w)
    assert s.tolist() == [1, 1] and float(a[0, 0]) == 0.5 and float(w[0, 0]) == pytest.approx(0.9)


def test_one_program_for_sites_of_one_form() -> None:
    found = programs(planned(DELTA_LORA, "update = literal", "*"))
    paths = [names["W"] for program in found for names in program.sites]
    assert paths == ["first.weight", "second.weight"]


def test_a_stored_transposed_weight_moves_the_right_way(architectures: Any) -> None:
    text = f"method m(rank: int = 2, start: int = 3) {{\n{LOW_RANK}{DELTA_LORA}\n}}\nadapt **.c_attn {{ with m }}"
    (program,) = programs(surgery.plan(surgery.parse(text), architectures["gpt2"].model()))
    weight, zeros = torch.zeros(6, 5), torch.zeros(2, 6)
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    run(program, W=weight, A=a, B=b, A_before=zeros, B_before=torch.zeros(5, 2))
    torch.testing.assert_close(weight, (b @ a).T)


def test_programs_without_events() -> None:
    assert programs(planned("")) == ()


def test_weights_that_are_stored_differently_are_moved_apart() -> None:
    """A Linear and a Conv1D of one size share a formula, and nothing else."""
    model = nn.Sequential(nn.Linear(6, 6), Conv1D(6, 6))
    text = "adapt ** { with delta_lora(rank = 2, start = 0)  update = literal }\nstep { loss = mse }"
    found = programs(surgery.plan(surgery.parse(text), model))
    assert [[site["W"] for site in program.sites] for program in found] == [["0.weight"], ["1.weight"]]
    assert [program.move and program.move.transposed for program in found] == [False, True]


# --- W of all sites at once -------------------------------------------------------------------------------------------

MOVES = {
    "a product": ("W += 0.5 * delta", lambda B, A, g: B @ A),
    "a product less another number": ("W += -(B @ A) / 4", lambda B, A, g: -(B @ A) / 4),
    "a scaled product": ("W += B @ diag(g) @ A", lambda B, A, g: B * g @ A),
    "a transposed product": ("W += 3 * (A.T @ B.T).T", lambda B, A, g: 3 * B @ A),
    "a sum of products": ("W += B @ A + 2 * B @ diag(g) @ A", lambda B, A, g: B @ A + 2 * B * g @ A),
}


@pytest.mark.parametrize(("statement", "expected"), MOVES.values(), ids=MOVES)
def test_narrow_changes_move_all_weights_in_one_call(statement: str, expected: Any) -> None:
    plan = planned(f"after step {{ {statement} }}", pattern="*", extra="g = frozen normal(1.0)[rank]")
    torch.manual_seed(0)
    for program in programs(plan):
        assert program.move is not None and not program.kept
        out, inside = next(site.shape for site in plan.sites if site.parameter == program.sites[0]["W"])
        sizes = {"A": (2, inside), "B": (out, 2), "g": (2,), "W": (out, inside)}
        tensors = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
        wanted = tensors["W"] + expected(tensors["B"], tensors["A"], tensors["g"])
        run(program, **tensors)
        torch.testing.assert_close(tensors["W"], wanted)


@pytest.mark.parametrize("statement", ["W *= 0.9", "W += 0.1 * W", "W = W + A.T @ B.T", "W += 0.01"])
def test_other_changes_are_made_site_by_site(statement: str) -> None:
    found = programs(planned(f"after step {{ {statement.replace('A.T @ B.T', 'B @ A')} }}"))
    assert [program.move for program in found] == [None]


class Chain(nn.Module):
    """Two linears of different sizes, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows `[rows, 6]`."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("how", ["", " shared by model"])
def test_a_step_moves_weights_by_factors_that_are_computed(how: str) -> None:
    """One call for sites of all sizes, over functions of their tensors; what sites share is kept once."""
    text = f"""
        method m(rank: int = 2) {{
            A = train normal(1.0)[rank, in];  B = train normal(1.0)[out, rank];  g = train ones[rank]{how}
            delta = B @ diag(g) @ A
            after step when step > 0 {{ W += 2 * (delta - prev(delta)) }}
        }}
        adapt layers.* {{ with m()  update = literal }}
        step {{ optimizer = sgd(lr = 0.1)  batch = 4  steps = 9  loss = mse  compile = off }}
    """
    torch.manual_seed(0)
    model = Chain().double()
    batch = {name: torch.randn(4, 6, dtype=torch.float64) for name in ("x", "labels")}
    step = surgery.compile(surgery.parse(text), model=model, example_inputs={"x": batch["x"]})
    assert step.source.count("add_products(targets") == 1 and "zip(*factors, strict=True)" in step.source
    assert step.source.count("keep(weights, [") == (2 if how else 1)

    def delta(path: str) -> torch.Tensor:
        tensors = {name: tensor.detach() for name, tensor in step.parameters_by_site[path].items()}
        return tensors["B"] * tensors["g"] @ tensors["A"]

    paths = list(step.parameters_by_site)
    moved = {path: model.get_parameter(f"{path}.weight").detach().clone() for path in paths}
    for number in range(5):
        before = {path: delta(path) for path in paths}
        step(batch)
        for path in paths:
            moved[path] += 2 * (delta(path) - before[path]) if number > 0 else 0
            torch.testing.assert_close(step.weights[f"{path}.weight"].detach(), moved[path])
    assert not any(torch.equal(moved[path], model.get_parameter(f"{path}.weight")) for path in paths)
