"""The memory of a step over a quantized base: predicted, measured, and as the plan of a skeleton has it."""

from __future__ import annotations

from typing import Any

import torch

import surgery
from surgery.compiler.kernels.quantized_linear import quantized, quantized_linear, workspace
from surgery.compiler.memory import measured, predicted
from surgery.compiler.storages import Storages


def test_predicted_memory_is_that_of_a_run_and_of_the_plan(architectures: Any) -> None:
    llama = architectures["llama"]
    dense = llama.spec("lora(rank = 2)", "optimizer = adamw(lr = 0.1)  batch = 4  compile = off  recompute = blocks")
    program = surgery.parse(dense.replace("task =", "quantize = nf4  task ="))
    step = surgery.compile(program, model=llama.model())
    own = {tensor.untyped_storage()._cdata for tensor in step.weights.values()}
    model = [*step.model.parameters(), *step.model.buffers()]
    others = [tensor for tensor in model if tensor.untyped_storage()._cdata not in own]
    given = {**llama.inputs(4, 24), "labels": llama.labels(4, 24)}
    assert predicted(step, 24, "cpu") == measured(step, step.weights, others, given)
    with torch.device("meta"):
        skeleton = llama.factory(0.0)
    plan, plain = (surgery.plan(one, skeleton, memory=True) for one in (program, surgery.parse(dense)))
    assert plan.memory == predicted(step, plan.tokens // 4)
    assert plan.memory is not None and plain.memory is not None and plan.quantized is not None
    assert plain.memory.weights - plan.memory.weights == plan.quantized.dense_bytes - plan.quantized.bytes


def test_the_matrix_of_a_product_counts_while_it_runs() -> None:
    weight, scale = quantized(torch.randn(64, 128), "int8")
    x, storages = torch.randn(3, 128), Storages()
    with storages:
        y = quantized_linear(x, weight, scale)
    assert storages.now.total() == y.numel() * 4
    assert storages.most == y.numel() * 4 + 64 * 128 * 4 == storages.now.total() + workspace(x, weight)
