"""Attention after the optimizations: the same outputs and gradients, without repeated keys, without dense masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from surgery.compiler import p5_capture
from surgery.compiler.capture.causal import ATTENTION
from surgery.compiler.graph import Graph, copy_module
from surgery.compiler.optimize.attention import group_queries


def captured(family: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> tuple[nn.Module, Graph]:
    """A tiny model with four heads, two of which share a key, and its graph."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**fields, **settings}), dtype=dtype)
    return model, p5_capture.run(model, {"input_ids": torch.randint(0, 97, (2, 11))}, "causal_lm")


def attentions(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is ATTENTION]


def in_float64(module: fx.GraphModule) -> fx.GraphModule:
    """The same operations on float64, so that a graph that was captured in half precision can be checked."""
    twin = copy_module(module)
    narrow = (torch.bfloat16, torch.float16, torch.float32)
    for node in twin.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, lambda value: torch.float64 if value in narrow else value)
        node.kwargs = fx.node.map_aggregate(node.kwargs, lambda value: torch.float64 if value in narrow else value)
    twin.recompile()
    return twin.double()


def outputs_and_gradients(module: fx.GraphModule, **inputs: Tensor) -> list[Tensor]:
    output = module(**inputs)
    parameters = list(module.parameters())
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weight).sum(), parameters)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("heads", [1, 2])
def test_keys_are_not_repeated(family: str, heads: int) -> None:
    settings: dict[str, Any] = {"sliding_window": None} if family == "mistral" else {}
    _, graph = captured(family, num_key_value_heads=heads, **settings)
    before = copy_module(graph.module)
    assert group_queries(graph.module) == 2
    for node in attentions(graph.module):
        assert node.kwargs["enable_gqa"] is True
        assert [argument.meta["val"].shape[1] for argument in node.args[:3]] == [4, heads, heads]  # type: ignore[union-attr]
    tokens = torch.randint(0, 97, (3, 13))
    expected = outputs_and_gradients(in_float64(before), input_ids=tokens)
    found = outputs_and_gradients(in_float64(graph.module), input_ids=tokens)
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_what_stays_as_it_is() -> None:
    for dtype, settings in (
        (torch.float32, {}),  # torch has no kernel for groups there on a GPU
        (torch.bfloat16, {"head_dim": 264}),  # nor for heads as wide as this
        (torch.bfloat16, {"num_key_value_heads": 4}),  # nothing is repeated
        (torch.bfloat16, {"sliding_window": 4}),  # a mask that is more than causal
    ):
        _, graph = captured("mistral", dtype, **{"sliding_window": None, **settings})
        assert group_queries(graph.module) == 0


def test_a_repeat_that_something_else_reads_stays() -> None:
    _, graph = captured("llama")
    node = attentions(graph.module)[0]
    with graph.module.graph.inserting_after(node):
        node.args[1].meta["copy"] = graph.module.graph.call_function(torch.ops.aten.sum.default, (node.args[1],))  # type: ignore[union-attr]
    assert group_queries(graph.module) == 1


class Tiled(nn.Module):
    """Keys in another order than `enable_gqa` has: k0 k1 k0 k1, where a repeat gives k0 k0 k1 k1."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        batch, groups, length, size = key.shape
        keys = key.unsqueeze(1).expand(batch, 2, groups, length, size).reshape(batch, 2 * groups, length, size)
        return nn.functional.scaled_dot_product_attention(query, keys, keys)


def test_another_order_is_no_repeat() -> None:
    query, key = torch.randn(2, 4, 5, 8, dtype=torch.bfloat16), torch.randn(2, 2, 5, 8, dtype=torch.bfloat16)
    graph = p5_capture.run(Tiled(), {"query": query, "key": key}, None)
    assert len(attentions(graph.module)) == 1 and group_queries(graph.module) == 0
