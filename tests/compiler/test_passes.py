"""Golden text of every pass for the demo spec: what each one gives, as a person would want to read it.

`pytest --update-golden tests/compiler/test_passes.py` writes the files in tests/golden/demo/ anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import fx

import surgery
from surgery.compiler import (
    nodes,
    p1_parse,
    p2_check,
    p3_resolve,
    p4_choose,
    p5_capture,
    p6_rewrite,
    p7_lower,
    p8_optimize,
    p9_emit,
)  # fmt: skip
from surgery.compiler.examples import example_inputs
from surgery.compiler.graph import Graph, tensors
from surgery.compiler.nodes import Tree
from surgery.compiler.pipeline import PASSES
from surgery.compiler.plan import Plan, Site, way_text
from surgery.compiler.printer import show
from surgery.compiler.program import Program
from surgery.compiler.span import Source
from surgery.runtime.initialise import initialise
from surgery.runtime.models import load_model, load_skeleton

Golden = Callable[[str, str], None]
ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "specs" / "demo.surg"


def _pinned() -> bool:
    """Whether torch and transformers are those of constraints.txt."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    found = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
    return all(pins[name].strip() == version for name, version in found.items())


of_the_graph = pytest.mark.skipif(
    not _pinned(),
    reason="torch.export and the model's code in transformers word the graph anew with every version: "
    "its text is compared on the pinned ones only",
)


@dataclass(frozen=True)
class Demo:
    """What every pass gives for the demo; one capture for all tests."""

    tree: Tree
    program: Program
    resolved: Plan
    chosen: Plan
    captured: Graph
    rewritten: Graph
    lowered: Graph
    optimized: Graph
    step: str


@pytest.fixture(scope="module")
def demo() -> Demo:
    tree = p1_parse.run(Source("demo.surg", SPEC.read_text(encoding="utf-8")))
    program = p2_check.run(tree, SPEC.parent)
    assert program.model is not None
    resolved = p3_resolve.run(program, load_skeleton(program.model, program.folder))
    chosen = p4_choose.run(resolved)
    model = load_model(program.model, program.folder, torch.device("cpu"))
    captured = p5_capture.run(model, example_inputs(model, program.model.task), program.model.task)
    rewritten = p6_rewrite.run(chosen, captured, initialise(chosen, tensors(captured.module)))
    lowered = p7_lower.run(rewritten)
    optimized = p8_optimize.run(lowered)
    step = p9_emit.run(chosen, optimized)
    return Demo(tree, program, resolved, chosen, captured, rewritten, lowered, optimized, step)


# --- readable forms ---------------------------------------------------------------------------------------------------


def dump(value: Any, indent: str = "") -> str:
    """A part of the tree: a node on one line if it fits, else its fields on lines of their own."""
    if isinstance(value, nodes.Node):
        parts = {field.name: getattr(value, field.name) for field in fields(value) if field.compare}
        entries = [
            f"{name} = {dump(part, indent + '    ')}" for name, part in parts.items() if part not in ((), "", None)
        ]
        return _wrapped(type(value).__name__, "()", entries, indent)
    if isinstance(value, tuple):
        return _wrapped("", "[]", [dump(part, indent + "    ") for part in value], indent)
    return repr(value)


def _wrapped(name: str, brackets: str, entries: list[str], indent: str) -> str:
    line = f"{name}{brackets[0]}{', '.join(entries)}{brackets[1]}"
    if len(indent) + len(line) <= 100 and "\n" not in line:
        return line
    inside = "".join(f"\n{indent}    {entry}" for entry in entries)
    return f"{name}{brackets[0]}{inside}\n{indent}{brackets[1]}"


def record(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def facts(site: Site) -> str:
    known = site.facts.model_dump()
    rank = known.pop("rank_bound")
    return ", ".join([f"rank_bound={rank}", *(name for name, holds in known.items() if holds)])


def plan_text(plan: Plan) -> str:
    """The plan without the texts it carries: the sites as lines, the rest as JSON."""
    rest = plan.model_dump(mode="json", exclude={"sites", "spec", "library"}) | {"library": sorted(plan.library)}
    lines, first = [record(rest), ""], {site.formula: site for site in reversed(plan.sites)}
    for site in plan.sites:
        own = " ".join(f"{tensor.role} {tensor.key}{list(tensor.shape)} {tensor.dtype}" for tensor in site.tensors)
        lines += [
            f"{site.path}  layer {site.layer}  {site.kind}  {list(site.shape)}  {site.module_class} {site.dtype}",
            f"    {site.formula}: {site.method}  rule {site.rule} (line {site.place.line})  update {site.update}",
            f"    {own}",
            f"    trained {site.trainable}, frozen {site.frozen}  {facts(site)}",
        ]
        if site.strategy:
            lines.append(f"    {site.strategy}: {site.reason}")
        lines += [
            f"        {way_text(found.strategy, found.operation)}: {found.flops} flops, {found.bytes} bytes"
            + ("" if found.legal else ", not legal")
            + (f" ({found.reason})" if found.reason else "")
            for found in (site.candidates if first[site.formula] is site else ())  # costs are those of the formula
        ]
    return "\n".join(lines) + "\n"


def name_of(target: Any) -> str:
    known = isinstance(target, str | torch._ops.OpOverload)
    return str(target) if known else str(getattr(target, "__name__", target))


def graph_text(graph: Graph) -> str:
    """A graph's nodes as lines, weights by their names where they are used."""

    def spelt(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"<{value.target}>" if value.op == "get_attr" else value.name
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(spelt, value))}]"
        return str(value)

    lines = [f"inputs {', '.join(graph.inputs)}; output {graph.output}"]
    for node in graph.module.graph.nodes:
        given = [*map(spelt, node.args), *(f"{name}={spelt(value)}" for name, value in node.kwargs.items())]
        line = str(node.meta["span"]) if "span" in node.meta else ""
        match node.op:
            case "placeholder":
                lines.append(f"{node.name} = input")
            case "output":
                lines.append(f"return {', '.join(given)}")
            case "call_function" | "call_module" | "call_method":
                lines.append(
                    f"{node.name} = {name_of(node.target)}({', '.join(given)})" + (f"  # {line}" if line else "")
                )
    return "\n".join(lines) + "\n"


# --- the tests --------------------------------------------------------------------------------------------------------


def test_p1_the_tree(demo: Demo, golden: Golden) -> None:
    golden(f"{show(demo.tree)}\n{'-' * 80}\n{dump(demo.tree)}\n", "golden/demo/p1.txt")


def test_p2_the_program(demo: Demo, golden: Golden) -> None:
    program = demo.program
    rules = [
        {
            "pattern": rule.node.pattern.text, "classes": list(rule.node.classes), "method": rule.method.name,
            "arguments": dict(rule.arguments), "expect": rule.expect, "alias": rule.alias,
            "strategy": rule.strategy, "update": rule.update,
        }
        for rule in program.rules
    ]  # fmt: skip
    trained = [
        {"pattern": rule.node.pattern.text, "lr": rule.lr, "weight_decay": rule.weight_decay}
        for rule in program.trained
    ]
    assert program.model is not None and program.data is not None
    text = record(
        {
            "rules": rules, "trained": trained, "frozen": [item.pattern.text for item in program.frozen],
            "model": program.model.model_dump(mode="json"), "step": program.step.model_dump(mode="json"),
            "data": program.data.model_dump(mode="json"), "warnings": [found.message for found in program.warnings],
        }
    )  # fmt: skip
    golden(text + "\n", "golden/demo/p2.txt")


def test_p3_the_plan(demo: Demo, golden: Golden) -> None:
    golden(plan_text(demo.resolved), "golden/demo/p3.txt")


def test_p4_the_choice(demo: Demo, golden: Golden) -> None:
    golden(plan_text(demo.chosen), "golden/demo/p4.txt")


@of_the_graph
def test_p5_the_graph(demo: Demo, golden: Golden) -> None:
    golden(graph_text(demo.captured), "golden/demo/p5.txt")


@of_the_graph
def test_p6_the_adapted_graph(demo: Demo, golden: Golden) -> None:
    golden(graph_text(demo.rewritten), "golden/demo/p6.txt")


@of_the_graph
def test_p7_the_lowered_graph(demo: Demo, golden: Golden) -> None:
    golden(graph_text(demo.lowered), "golden/demo/p7.txt")


@of_the_graph
def test_p8_the_optimized_graph(demo: Demo, golden: Golden) -> None:
    golden(graph_text(demo.optimized), "golden/demo/p8.txt")


@of_the_graph
def test_p9_the_step(demo: Demo, golden: Golden) -> None:
    golden(demo.step, "golden/demo/p9.txt")


@of_the_graph
def test_a_block_of_a_decoder(golden: Golden, architectures: Any) -> None:
    """Sites that read one input stand in one call; each names the line of its rule."""
    architecture = replace(architectures["llama"], adapt="model.layers.*.self_attn.*: Linear")
    text = architecture.spec("lora(rank = 4, alpha = 8)  strategy = branch")
    text += "adapt model.layers.*.mlp.{gate,up}_proj { with dora(rank = 2)  strategy = branch }\n"
    model = architecture.model(hidden_size=64, intermediate_size=96)
    step = surgery.compile(surgery.parse(text, name="llama.surg"), model, architecture.inputs())
    start, end = (step.source.index(f"def {name}(") for name in ("llama_decoder_layer", "forward"))
    golden(step.source[start:end].rstrip() + "\n", "golden/llama_block.txt")


def test_a_pass_changes_nothing_that_it_was_given(demo: Demo) -> None:
    assert demo.tree == p1_parse.run(Source("demo.surg", SPEC.read_text(encoding="utf-8")))
    assert all(site.strategy == "" and site.candidates == () for site in demo.resolved.sites)
    graphs = (demo.captured, demo.rewritten, demo.lowered)
    spans = [sum("span" in node.meta for node in graph.module.graph.nodes) for graph in graphs]
    assert spans[0] == 0 and spans[1] >= len(demo.chosen.sites) and spans[2] >= spans[1]
    assert demo.lowered.inputs == demo.captured.inputs


def test_every_pass_has_a_golden_file() -> None:
    names = [module.__name__.rpartition(".")[2].partition("_")[0] for module in PASSES]
    assert names == sorted(path.stem for path in (ROOT / "tests" / "golden" / "demo").iterdir())
