"""The emitted source: bitwise the graph for every architecture, no longer for deeper models, and torch with kernels."""

from __future__ import annotations

import ast
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)  # fmt: skip

import surgery
from surgery.compiler import p5_capture
from surgery.compiler.diagnostics import SurgError
from surgery.compiler.emit.body import Body, wrapped
from surgery.compiler.emit.forward import forward_source
from surgery.compiler.emit.naming import Names, snake
from surgery.compiler.emit.tables import names_list
from surgery.compiler.emit.template import schedule_source
from surgery.compiler.graph import tensors
from surgery.compiler.plan import SchedulePlan

PREAMBLE = """
from __future__ import annotations
import math, torch
import torch.nn.functional as F
from torch import Tensor
from typing import Any
Weights = dict[str, Tensor]
"""
SPEC = """
model "given" {{ task = {task} }}
adapt {pattern} {{ with {method} }}
step {{ optimizer = adamw(lr = 1e-3)  batch = 4  micro_batch = 3  steps = 10  clip = 1.0 }}
"""


def execute(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "emitted"}
    exec(PREAMBLE + source if "from __future__" not in source else source, namespace)
    return namespace


def step_of(architecture: Any, pattern: str, method: str = "lora(rank = 2, alpha = 4)", **settings: Any) -> Any:
    labels = "(labels = 3)" if architecture.task.endswith("classification") else ""
    text = SPEC.format(task=architecture.task + labels, pattern=pattern, method=method)
    model = architecture.model(**settings)
    return surgery.compile(surgery.parse(text), model=model, example_inputs=architecture.inputs())


def outputs_and_gradients(run: Callable[..., Tensor], learned: list[Tensor], training: bool) -> tuple[Any, ...]:
    torch.manual_seed(3)
    output = run(training)
    return output, *torch.autograd.grad(output.square().sum(), learned, allow_unused=True)


def test_the_forward_equals_the_graph_to_the_bit(architecture: Any, captured: Any) -> None:
    _, graph = captured(architecture)
    weights, inputs = tensors(graph.module), architecture.inputs(2, 11)
    learned = [tensor for tensor in dict.fromkeys(weights.values()) if tensor.requires_grad]
    emitted = forward_source(graph)
    # in older versions of transformers the two layers of Gemma 2, of two kinds, are not spelt alike
    functions = {"t5": {2}, "gemma2": {0, 1}}.get(architecture.name, {1})
    assert len(emitted.block_functions) in functions
    assert max(map(len, emitted.source.splitlines())) <= 132
    forward = execute(emitted.source)["forward"]
    for training in (True, False):
        ours = outputs_and_gradients(lambda mode: forward(weights, *inputs.values(), mode), learned, training)
        theirs = outputs_and_gradients(lambda mode: graph.module(*inputs.values(), mode), learned, training)
        for left, right in zip(ours, theirs, strict=True):
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left, right)


def test_a_step_of_13_layers_has_the_lines_of_one_of_7(architectures: Any) -> None:
    pattern = "model.layers.*.{self_attn,mlp}.*_proj"
    method = "delta_lora(rank = 2, alpha = 4, start = 1)"
    short, long = (
        step_of(architectures["llama"], pattern, method, num_hidden_layers=layers).source.splitlines()
        for layers in (7, 13)
    )
    assert len(short) == len(long) <= 300
    changed = [(a, b) for a, b in zip(short, long, strict=True) if a != b]
    assert all(
        a.replace("7", "13").replace("6", "12") == b
        for a, b in changed
        if "numbers" not in a and "weights ada" not in a
    )


def test_methods_on_some_blocks_make_functions_of_their_own(architectures: Any) -> None:
    step = step_of(architectures["llama"], "model.layers.[2..3].self_attn.q_proj", num_hidden_layers=6)
    assert "def llama_decoder_layer_0(" in step.source and "def llama_decoder_layer_2(" in step.source
    inputs = architectures["llama"].inputs(3, 7)
    with torch.no_grad():
        assert torch.equal(step.forward(**inputs).logits, step.module(*inputs.values(), False))


def test_alternating_masks_are_two_calls_in_one_loop(architectures: Any) -> None:
    llama = architectures["gemma2"]
    graph = p5_capture.run(llama.model(num_hidden_layers=6), llama.inputs(), llama.task)
    source = forward_source(graph).source
    assert "if index % 2 == 0:" in source and "range(6)" in source


def test_the_rewritten_forward_equals_its_graph(architectures: Any) -> None:
    bert = architectures["bert"]
    step = step_of(bert, "bert.encoder.layer.*.**: Linear", "dora(rank = 2, dropout = 0.2)", dropout=0.1)
    inputs = bert.inputs(3, 7)
    learned = [step.weights[name] for name in step.state_dict()["weights"] if step.weights[name].requires_grad]
    forward = execute(step.source)["forward"]
    ours = outputs_and_gradients(lambda mode: forward(step.weights, *inputs.values(), mode), learned, True)
    theirs = outputs_and_gradients(lambda mode: step.module(*inputs.values(), mode), learned, True)
    assert all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))


def test_step_py_imports_torch_and_of_surgery_kernels_alone(architectures: Any) -> None:
    step = step_of(architectures["bert"], "bert.encoder.layer.*.attention.self.{query,value}")
    tree = ast.parse(step.source)
    imported = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    own = {name for name in imported if name.partition(".")[0] == "surgery"}
    assert own == {f"surgery.compiler.kernels.{name}" for name in ("low_rank", "over_processes")}
    others = {name.partition(".")[0] for name in imported - own}
    assert others <= {"__future__", "typing", "math", "collections", "torch"}
    assert 'w["attention.self.query.A"]' in step.source and "# <text>:3" in step.source
    assert "def forward(" in step.graph_source and "train_step" not in step.graph_source
    execute(step.graph_source)


def test_a_model_without_a_loss_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    program = surgery.parse("adapt 0 { with lora(rank = 2) }  step { optimizer = sgd(lr = 0.1)  steps = 1 }")
    with pytest.raises(SurgError) as caught:
        surgery.compile(program, model=model, example_inputs={"input": torch.randn(2, 4)})
    assert caught.value.diagnostics[0].code == "SURG031"


# --- spelling ---------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Operations in every spelling that the emitter has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=1)
        self.norm, self.group, self.conv = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Conv1d(4, 4, 3, padding=1)
        self.batch = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        y = self.norm(self.table(n)) - (x - (x - 1.5)) / (2.0 - x.abs() * -3)
        y = -(y**2) + (1 - y) * ~(y > 0) + y.where(y.isnan() | (y <= 0.3) & (y != 1), -2.0)
        z = self.batch(self.conv(y.transpose(1, 2))) + self.group(y.mT.contiguous())
        z = torch.cat([z[:, 1:3], z[:, 0].unsqueeze(1), z[:, -1:]], 1).clamp(min=-3)
        a, b = z.chunk(2, dim=1)
        rows = torch.arange(z.shape[0], device=z.device)
        picked = z[rows, 0] + z[rows[:, None], torch.tensor([1, 2])].sum(1)
        scores = torch.softmax((a @ b.mT).masked_fill(torch.ones_like(a @ b.mT).triu(1).bool(), float("-inf")), -1)
        top = torch.topk(z.flatten(1), 2)[0].amax(-1, keepdim=True)
        mean = z.mean((1, 2), keepdim=True).squeeze(1) + z.sum() + torch.full((1,), float("inf")).reciprocal()
        whole = (x.shape[1] * 2 + 1) // 3 % 5
        result: Tensor = picked + scores.sum(1)[:, :1] + top + mean + whole + torch.rsqrt(z.var() + 1e-6) + z.norm()
        return result


def test_every_spelling_means_the_operation() -> None:
    torch.manual_seed(0)
    model = Everything()
    example = {"x": torch.randn(3, 5, 4), "n": torch.randint(7, (3, 5))}
    graph = p5_capture.run(model, example, None)
    source = forward_source(graph).source
    forward = execute(source)["forward"]
    weights = {name: tensor.detach().clone() for name, tensor in tensors(graph.module).items()}
    inputs = {"x": torch.randn(2, 6, 4), "n": torch.randint(7, (2, 6))}
    theirs = graph.module(*inputs.values(), True)[0]
    ours = forward(weights, *inputs.values(), True)[0]
    assert torch.equal(ours, theirs)
    assert torch.equal(
        weights["batch.running_mean"], model.batch.get_buffer("running_mean")
    )  # written in place, once by each
    for text in ("[:, 1:3]", 'float("-inf")', "F.embedding(n, ", "-inf"):
        assert text in source, source


@pytest.mark.parametrize("seed", range(20))
def test_precedence(seed: int) -> None:
    """Random expressions, nested as deep as they get, have the value of their graph."""
    choice = random.Random(seed)
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in "abc"]
    aten = torch.ops.aten
    binary = [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.matmul.default]
    for _ in range(12):
        left, right = choice.choice(nodes[-3:]), choice.choice(nodes)
        kind = choice.randrange(8)
        if kind < 5:
            nodes.append(graph.call_function(binary[kind], (left, right)))
        elif kind == 5:
            nodes.append(graph.call_function(aten.neg.default, (left,)))
        elif kind == 6:
            nodes.append(graph.call_function(aten.rsub.Scalar, (left, -1.5)))
        else:
            nodes.append(graph.call_method("transpose", (left, -2, -1)))
    graph.output(nodes[-1])
    graph.eliminate_dead_code()
    known = {node: str(node.target) for node in graph.nodes if node.op == "placeholder"}
    body = Body(known, str, Names(frozenset("abc")), {nodes[-1]})
    body.write([node for node in graph.nodes if node.op not in ("placeholder", "output")])
    values = {name: torch.randn(3, 3, dtype=torch.float64) for name in "abc"}
    expected = fx.GraphModule({}, graph)(**values)
    exec("\n".join(body.lines), {"torch": torch}, values)
    torch.testing.assert_close(values[known[nodes[-1]]], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("LlamaDecoderLayer", "llama_decoder_layer"), ("ViTLayer", "vit_layer"), ("GPT2Block", "gpt2_block"),
     ("SelfAttention", "self_attention"), ("0", "_0"), ("a.b-c", "a_b_c")],
)  # fmt: skip
def test_identifiers(name: str, expected: str) -> None:
    assert snake(name) == expected


def test_long_calls_are_wrapped_and_mean_the_same() -> None:
    statement = "value = f(" + ", ".join(f"[argument_{n}, {n}]" for n in range(20)) + ")"
    lines = wrapped(statement)
    assert len(lines) > 2 and max(map(len, lines)) <= 120
    assert ast.dump(ast.parse("\n".join(lines))) == ast.dump(ast.parse(statement))


@pytest.mark.parametrize("depth", [1, 3, 40])
def test_tables_give_the_names_back(depth: int) -> None:
    names = [f"a.layers.{n}.{inner}" for n in range(depth) for inner in ("q.A", "q.B")] + ["head.weight"]
    names += [f"a.odd.{n}.x" for n in (1, 4)]
    lines = names_list(names)
    assert sorted(eval("\n".join(lines))) == sorted(names)
    assert len(lines) == len(names_list([name for name in names if ".layers." not in name or ".0." in name]))


# --- schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0.0, 0.25, 3.0])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine with a minimum"])
def test_schedules_are_those_of_transformers(name: str, warmup: float) -> None:
    steps = 17
    count = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    minimum = 0.1 if "minimum" in name else 0.0
    theirs = {
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, count),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, count, steps),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, count, steps),
        "cosine with a minimum": lambda: get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, count, steps, min_lr_rate=minimum
        ),
    }[name]()
    plan = SchedulePlan(name=name.partition(" ")[0], warmup=warmup, minimum=minimum)  # type: ignore[arg-type]
    schedule = execute(schedule_source(plan))["schedule"]
    for step in range(steps + 3):
        assert schedule(step, steps) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
