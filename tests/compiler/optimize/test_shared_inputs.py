"""Sites that read one input as one call: the same outputs and gradients, the order of effects, and what stays apart."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import surgery
from surgery.compiler import p5_capture, p6_rewrite, p7_lower, p8_optimize
from surgery.compiler.graph import Graph, tensors
from surgery.compiler.kernels.low_rank import low_rank_linear
from surgery.compiler.optimize.shared_inputs import join_sites
from surgery.compiler.span import Span
from surgery.runtime.initialise import initialise

WIDTH, RANK = 6, 2


def calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is low_rank_linear]


def sites_of(graph: fx.Graph) -> list[int]:
    """How many sites each call has, in order."""
    return [len(call.kwargs["weights"]) for call in calls(graph)]  # type: ignore[arg-type]


# --- whole models -----------------------------------------------------------------------------------------------------

METHODS = [
    "lora(rank = 3)", "vera(rank = 3)", "dora(rank = 3)", "kasa(rank = 2)", "loha(rank = 2)", "reslora(rank = 2)",
    "lora_xs(rank = 3)", "delta_lora(rank = 2, ratio = 0.5, start = 1) update = telescope",
    "lora(rank = 2) + circulant_blocks(block = 4)",
]  # fmt: skip
# The sites, and how many of them the calls of a block have.
MODELS = {
    "llama": ("model.layers.*.**: Linear", [3, 1, 2, 1]),
    "bert": ("bert.encoder.layer.*.**: Linear", [3, 1, 1, 1]),
    "gpt2": ("transformer.h.*.**: Conv1D", [1, 1, 1, 1]),
}


@functools.cache
def in_float64(architecture: Any) -> tuple[nn.Module, Graph]:
    """A tiny model and its graph, which computes all in float64."""
    model = architecture.model().double()
    graph = p5_capture.run(model, architecture.inputs(3, 5), architecture.task).copy()
    for node in graph.module.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda value: torch.float64 if value is torch.float32 else value
        )
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            node.meta["val"] = value.double()
    graph.module.recompile()
    return model, graph


def outputs_and_gradients(module: fx.GraphModule, inputs: dict[str, Tensor]) -> list[Tensor]:
    output = module(**inputs)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    learned = [tensor for tensor in tensors(module).values() if tensor.requires_grad]
    assert learned
    return [output, *torch.autograd.grad((output * weight).sum(), learned)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_optimized_graph_equals_the_lowered_one(name: str, method: str, architectures: Any) -> None:
    architecture = architectures[name]
    pattern, groups = MODELS[name]
    model, graph = in_float64(architecture)
    program = surgery.parse(replace(architecture, adapt=pattern).spec(f"{method}  strategy = branch"))
    plan = surgery.plan(program, copy.deepcopy(model))
    starts = initialise(plan, tensors(graph.module))
    generator = torch.Generator().manual_seed(7)
    for value in starts.values():  # no factor is zero, and the telescope's switch is on
        value += 0.3 * torch.rand(value.shape, generator=generator, dtype=torch.float64)
    for parameter in graph.module.parameters():
        parameter.requires_grad_(False)
    lowered = p7_lower.run(p6_rewrite.run(plan, graph, starts))
    before = str(lowered.module.graph)
    optimized = p8_optimize.run(lowered)
    assert str(lowered.module.graph) == before
    assert sites_of(lowered.module.graph) == [1] * sum(groups) * 2
    assert sites_of(optimized.module.graph) == groups * 2
    joined = 2 * sum(size > 1 for size in groups)
    assert (f"{joined} groups of sites that read one input" in optimized.log) == (joined > 0)
    inputs = architecture.inputs()
    expected = outputs_and_gradients(lowered.module, inputs)
    found = outputs_and_gradients(optimized.module, inputs)
    for ours, theirs in zip(found, expected, strict=True):
        bound = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12 * bound)


def test_dropout_of_their_own_keeps_sites_apart(architectures: Any) -> None:
    """Each site draws a mask of its own, so no two read the same rows."""
    architecture = replace(architectures["llama"], adapt="model.layers.*.self_attn.*: Linear")
    program = surgery.parse(architecture.spec("lora(rank = 2, dropout = 0.1)  strategy = branch"))
    step = surgery.compile(program, architecture.model(), architecture.inputs())
    assert sites_of(step.graph.module.graph) == [1] * 8


def test_sites_keep_their_modules_and_lines(architectures: Any) -> None:
    architecture = architectures["llama"]
    text = architecture.spec("lora(rank = 2)  strategy = branch").replace("{q_proj,v_proj}", "q_proj")
    text += "adapt model.layers.*.self_attn.v_proj { with lora(rank = 3)  strategy = branch }\n"
    step = surgery.compile(surgery.parse(text), architecture.model(), architecture.inputs())
    call = calls(step.graph.module.graph)[0]
    paths = [[path for path, _ in user.meta["nn_module_stack"].values()][-1] for user in call.users]
    assert paths == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    spans = [user.meta["span"].line for user in call.users if isinstance(user.meta["span"], Span)]
    assert spans == [2, 4]
    assert [path for path, _ in call.meta["nn_module_stack"].values()][-1] == "model.layers.0.self_attn"
    assert "q_proj, v_proj = low_rank_linear(" in step.source and ")  # <text>:2, <text>:4" in step.source


def test_a_block_compiles_whole(architectures: Any) -> None:
    """Joined calls break no graph, and compute in a compiled block what they do outside."""
    architecture = replace(architectures["llama"], adapt="model.layers.*.self_attn.{q,k,v}_proj")
    text = architecture.spec("vera(rank = 3)  strategy = branch")
    text += "adapt model.layers.*.mlp.up_proj { with dora(rank = 2, dropout = 0.1)  strategy = branch }\n"
    step = surgery.compile(surgery.parse(text), architecture.model(), architecture.inputs(3, 5))
    namespace, tokens = step._namespace, architecture.inputs()["input_ids"]
    learned = [tensor for tensor in step.weights.values() if tensor.requires_grad]

    def values() -> list[Tensor]:
        torch.manual_seed(0)
        output = namespace["forward"](step.weights, tokens, True)
        return [output, *torch.autograd.grad(output.sin().sum(), learned)]

    expected, block = values(), namespace["llama_decoder_layer"]
    namespace["llama_decoder_layer"] = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- graphs by hand ---------------------------------------------------------------------------------------------------


class Builder:
    """A graph over parameters of its own; `site` puts in a call, with the nodes of its operands."""

    def __init__(self) -> None:
        self.root, self.graph = nn.Module(), fx.Graph()
        self.generator = torch.Generator().manual_seed(2)
        self.x = self.graph.placeholder("x")

    def tensor(self, name: str, *shape: int, trained: bool = True) -> fx.Node:
        if not hasattr(self.root, name):
            value = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            self.root.register_parameter(name, nn.Parameter(value, trained))
        return self.graph.get_attr(name)

    def site(self, name: str, x: fx.Node | None = None, module: str = "blocks.0.", **operands: Any) -> fx.Node:
        given: dict[str, Any] = {
            "weights": [self.tensor(f"{name}_weight", WIDTH, WIDTH, trained=False)], "biases": [None],
            "lefts": [self.tensor(f"{name}_left", WIDTH, RANK)], "rights": [self.tensor(f"{name}_right", RANK, WIDTH)],
            "scales": [0.5],
        }  # fmt: skip
        call = self.graph.call_function(low_rank_linear, (x or self.x,), {**given, **operands})
        call.meta["nn_module_stack"] = {name: (f"{module}{name}", nn.Linear)}
        result = self.graph.call_function(operator.getitem, (call, 0))
        result.meta = {"nn_module_stack": call.meta["nn_module_stack"], "val": name}
        return result

    def apply(self, function: Callable[..., Any], *arguments: Any) -> fx.Node:
        return self.graph.call_function(function, arguments)

    def module(self, *results: fx.Node) -> fx.GraphModule:
        total = functools.reduce(lambda left, right: self.apply(operator.add, left, right), results)
        self.graph.output(total)
        return fx.GraphModule(self.root, self.graph)


def joined(builder: Builder, *results: fx.Node) -> tuple[int, list[int]]:
    """Joins the sites of a graph, and checks that its values and gradients are what they were."""
    module = builder.module(*results)
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

    def values() -> list[Tensor]:
        output = module(x)
        return [output, *torch.autograd.grad(output.sin().sum(), leaves, allow_unused=True, materialize_grads=True)]

    expected = values()
    count = join_sites(module)
    module.graph.lint()
    module.recompile()
    for ours, theirs in zip(values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    return count, sites_of(module.graph)


def test_sites_of_one_input_are_one_call_at_the_first() -> None:
    builder = Builder()
    first = builder.site("a")
    between = builder.apply(torch.tanh, first)
    second, third = builder.site("b", biases=[builder.tensor("bias", WIDTH)]), builder.site("c", scales=[2.0])
    assert joined(builder, between, second, third) == (1, [3])
    (call,) = calls(builder.graph)
    assert call.kwargs["scales"] == [0.5, 0.5, 2.0]
    results = sorted(call.users, key=lambda user: user.args[1])  # type: ignore[arg-type, return-value]
    assert [user.meta["val"] for user in results] == ["a", "b", "c"]
    assert list(builder.graph.nodes).index(call) < list(builder.graph.nodes).index(between)


def test_other_inputs_other_rows_and_other_blocks_stay_apart() -> None:
    builder = Builder()
    other, half = builder.apply(torch.tanh, builder.x), builder.apply(operator.mul, builder.x, 0.5)
    a, b = builder.site("a"), builder.site("b", other)
    c, d = builder.site("c", narrow=half), builder.site("d", module="blocks.1.")
    assert joined(builder, a, b, c, d) == (0, [1, 1, 1, 1])


def test_the_same_narrow_rows_are_joined() -> None:
    builder = Builder()
    half = builder.apply(operator.mul, builder.x, 0.5)
    a, b = builder.site("a", narrow=half), builder.site("b", narrow=half)
    assert joined(builder, a, b) == (1, [2])
    assert calls(builder.graph)[0].kwargs["narrow"] is half


def test_tied_tensors_are_joined_too() -> None:
    """A left that two sites share, and a weight that is used twice, get the sum of their gradients."""
    builder = Builder()
    a = builder.site("a")
    b = builder.site("b", lefts=[builder.tensor("a_left", WIDTH, RANK)], weights=[builder.tensor("a_weight")])
    assert joined(builder, a, b, builder.site("a")) == (1, [3])


def test_operands_are_moved_in_front() -> None:
    """What an operand is computed from moves along, in its order, if it is there at the first site."""
    builder = Builder()
    a = builder.site("a")
    gain = builder.apply(torch.exp, builder.tensor("gain", RANK))
    left = builder.apply(operator.mul, builder.tensor("shared", WIDTH, RANK), gain)
    b = builder.site("b", lefts=[left])
    assert joined(builder, a, b) == (1, [2])


def test_a_site_whose_operand_is_computed_later_stays_apart() -> None:
    """Its left is made of the first site's output: the others still join."""
    builder = Builder()
    a = builder.site("a")
    mean = builder.apply(torch.mean, a)
    left = builder.apply(operator.mul, builder.tensor("b_left", WIDTH, RANK), mean)
    b, c = builder.site("b", lefts=[left]), builder.site("c")
    d = builder.site("d", lefts=[builder.apply(operator.neg, left)])
    assert joined(builder, a, b, c, d) == (2, [2, 2])


def test_an_operand_that_is_drawn_stays_where_it_is() -> None:
    """Random numbers come in the order of the graph."""
    builder = Builder()
    a = builder.site("a")
    left = builder.apply(nn.functional.dropout, builder.tensor("b_left", WIDTH, RANK), 0.5, True)
    b = builder.site("b", lefts=[left])
    module = builder.module(a, b)
    assert join_sites(module) == 0


@pytest.mark.parametrize("writes", [torch.ops.aten.mul_.Tensor, "mul_"])
def test_nothing_moves_over_an_operation_that_writes(writes: Any) -> None:
    """x is changed in place between two sites: the second reads the new one."""
    builder = Builder()
    x = builder.apply(operator.mul, builder.x, 1.0)
    a = builder.apply(operator.mul, builder.site("a", builder.x), 1.0)
    call = builder.graph.call_method if isinstance(writes, str) else builder.graph.call_function
    changed = call(writes, (x, 3.0))
    b, c = builder.site("b", x), builder.site("c", x)
    d = builder.site("d", changed)
    assert joined(builder, a, b, c, d) == (1, [1, 2, 1])


def test_an_output_that_nobody_reads_is_no_name(architectures: Any) -> None:
    """Text for a call of three sites of which one is dead."""
    from surgery.compiler.emit.body import Body
    from surgery.compiler.emit.naming import Names

    builder = Builder()
    a, _, c = builder.site("a"), builder.site("b"), builder.site("c")
    module = builder.module(a, c)
    assert join_sites(module) == 1
    module.graph.eliminate_dead_code()
    body = Body({builder.x: "x"}, lambda name: name, Names(), set(), within="blocks.0")
    body.write([node for node in module.graph.nodes if node.op == "call_function"])
    assert body.lines[0] == "a, _, c = low_rank_linear("
