"""Attention after the optimizations: the same outputs and gradients, without repeated keys, without dense masks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import surgery
from surgery.compiler import p5_capture, p8_optimize
from surgery.compiler.capture.causal import ATTENTION
from surgery.compiler.graph import Graph, copy_module
from surgery.compiler.kernels.packed_attention import (
    block_mask,
    document_starts,
    packed_attention,
    packed_attention_reference,
)
from surgery.compiler.optimize.attention import group_queries
from surgery.compiler.optimize.packed_rows import pack_rows


def captured(
    family: str, dtype: torch.dtype = torch.bfloat16, more: dict[str, Tensor] | None = None, **settings: Any
) -> tuple[nn.Module, Graph]:
    """A tiny model with four heads, two of which share a key, and its graph."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**fields, **settings}), dtype=dtype)
    inputs = {"input_ids": torch.randint(0, 97, (2, 11))} | (more or {})
    return model, p5_capture.run(model, inputs, "causal_lm")


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


@pytest.mark.parametrize(("family", "heads"), [("llama", 1), ("llama", 2), ("mistral", 2), ("qwen3", 2), ("gemma", 1)])
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
    cases: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
        (torch.float32, {}),  # torch has no kernel for groups there on a GPU
        (torch.bfloat16, {"head_dim": 264}),  # nor for heads as wide as this
        (torch.bfloat16, {"num_key_value_heads": 4}),  # nothing is repeated
        (torch.bfloat16, {"sliding_window": 4}),  # a mask that is more than causal
    )
    for dtype, settings in cases:
        settings.setdefault("sliding_window", None)
        _, graph = captured("mistral", dtype, **settings)
        assert group_queries(graph.module) == 0


def test_a_repeat_that_something_else_reads_stays() -> None:
    _, graph = captured("llama")
    node = attentions(graph.module)[0]
    with graph.module.graph.inserting_after(node):
        node.args[1].meta["copy"] = graph.module.graph.call_function(torch.ops.aten.sum.default, (node.args[1],))  # type: ignore[union-attr]
    assert group_queries(graph.module) == 1


class Shared(nn.Module):
    """Four heads of size 8, two of which share a key and a value; `tiled` repeats them as k0 k1 k0 k1."""

    def __init__(self, width: int = 8, tiled: bool = False) -> None:
        super().__init__()
        self.width, self.tiled = width, tiled
        self.query, self.key, self.value = nn.Linear(6, 4 * 8), nn.Linear(6, 2 * 8), nn.Linear(6, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).view(*x.shape[:2], 4, 8).transpose(1, 2)
        key = self.repeated(self.key(x).view(*x.shape[:2], 2, 8).transpose(1, 2))
        value = self.repeated(self.value(x).view(*x.shape[:2], 2, self.width).transpose(1, 2))
        return nn.functional.scaled_dot_product_attention(query, key, value)

    def repeated(self, shared: Tensor) -> Tensor:
        batch, groups, length, size = shared.shape
        if self.tiled:
            return shared[:, None].expand(batch, 2, groups, length, size).reshape(batch, 2 * groups, length, size)
        return shared[:, :, None].expand(batch, groups, 2, length, size).reshape(batch, 2 * groups, length, size)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, 1),
        ({"tiled": True}, 0),  # `enable_gqa` has k0 k0 k1 k1
        ({"width": 4}, 0),  # what takes groups on a GPU takes keys and values of one size alone
    ],
)
def test_keys_are_shared_where_a_kernel_takes_them_in_their_order(settings: dict[str, Any], changed: int) -> None:
    graph = p5_capture.run(Shared(**settings).bfloat16(), {"x": torch.randn(2, 5, 6).bfloat16()}, None)
    assert len(attentions(graph.module)) == 1 and group_queries(graph.module) == changed


# --- rows of several documents ----------------------------------------------------------------------------------------


def positions(*rows: list[int]) -> Tensor:
    """Positions of rows with documents of these lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


PACKED = {"position_ids": positions([5, 6], [11])}


def packed_operations(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is packed_attention]


@pytest.mark.parametrize(("family", "heads"), [("llama", 2), ("llama", 4), ("mistral", 2), ("qwen3", 1), ("gemma", 2)])
def test_rows_of_documents(family: str, heads: int) -> None:
    settings: dict[str, Any] = {"sliding_window": None} if family == "mistral" else {}
    _, graph = captured(family, torch.float32, PACKED, num_key_value_heads=heads, **settings)
    before = copy_module(graph.module)
    assert pack_rows(graph.module) == 2 and not attentions(graph.module)
    assert all(node.args[1].meta["val"].shape[1] == heads for node in packed_operations(graph.module))  # type: ignore[union-attr]
    assert len([node for node in graph.module.graph.nodes if node.target is document_starts]) == 1
    tokens, places = torch.randint(0, 97, (3, 13)), positions([4, 9], [13], [1, 1, 11])
    inputs = {"input_ids": tokens, "position_ids": places}
    expected = outputs_and_gradients(in_float64(before), **inputs)
    found = outputs_and_gradients(in_float64(graph.module), **inputs)
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_packed_documents_are_as_each_alone() -> None:
    model, graph = captured("llama", torch.float32, PACKED)
    assert pack_rows(graph.module) == 2
    tokens = torch.randint(0, 97, (1, 12))
    together = graph.module(input_ids=tokens, position_ids=positions([5, 4, 3]), training=False)
    alone = [model.eval()(input_ids=part).logits for part in torch.split(tokens, [5, 4, 3], 1)]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


def test_masks_that_are_no_documents_stay() -> None:
    for family, more, settings in (
        ("mistral", PACKED, {"sliding_window": 4}),
        ("llama", PACKED, {"attention_dropout": 0.1}),
        ("llama", {"attention_mask": torch.ones(2, 11, dtype=torch.int64)}, {}),
        ("llama", PACKED | {"attention_mask": torch.ones(2, 11, dtype=torch.int64)}, {}),
        ("llama", {}, {}),
    ):
        _, graph = captured(family, torch.float32, more, **settings)
        assert pack_rows(graph.module) == 0 and len(attentions(graph.module)) == 2


def test_starts_of_documents() -> None:
    given = torch.tensor([[0, 1, 2, 0, 1, 0], [5, 6, 9, 10, 10, 11], [0, 0, 0, 1, 2, 3]])
    expected = [[0, 0, 0, 3, 3, 5], [0, 0, 2, 2, 4, 4], [0, 1, 2, 2, 2, 2]]
    assert document_starts(given).tolist() == expected


@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 300, 600])
def test_blocks_of_the_mask(length: int) -> None:
    """Each block that any token sees is read; one that is read without a look at its tokens is seen by all of them."""
    random = torch.Generator().manual_seed(length)
    begins = torch.rand(3, length, generator=random) < torch.tensor([[0.0], [0.01], [0.2]])
    starts = torch.arange(length).where(begins, 0).cummax(-1).values
    mask, index = block_mask(starts), torch.arange(length)
    seen = (index <= index[:, None]) & (index >= starts[:, :, None])
    count = -(-length // 128)
    room = count * 128 - length
    some = nn.functional.pad(seen, (0, room, 0, room)).view(3, count, 128, count, 128).any(4).any(2)
    every = nn.functional.pad(seen, (0, room, 0, room), value=True).view(3, count, 128, count, 128).all(4).all(2)
    read = [
        torch.zeros(3, count, count, dtype=torch.int64).scatter_add_(
            2, indices[:, 0].long(), (torch.arange(count) < numbers[:, 0, :, None]).long()
        )
        for numbers, indices in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
        if numbers is not None and indices is not None
    ]
    assert torch.equal(sum(read, torch.zeros(())), some.float())  # each once
    assert not (read[1].bool() & ~every).any()


def test_flex_attention_with_that_mask() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    starts = document_starts(positions([60, 140, 1], [201]))
    query, key, value = (torch.randn(2, heads, 201, 16) for heads in (4, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # uncompiled it is slow, and says so once
        found = flex_attention(query, key, value, block_mask=block_mask(starts), enable_gqa=True, scale=0.3)
    expected = packed_attention(query, key, value, starts, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(expected, packed_attention_reference(query, key, value, starts, 0.3))


@pytest.mark.parametrize("settings", ["", "recompute = blocks"])
def test_a_step_on_rows_of_documents(monkeypatch: pytest.MonkeyPatch, settings: str) -> None:
    program = surgery.parse(f"""
        adapt model.layers.*.self_attn.*_proj {{ with lora(rank = 2) }}
        step {{ optimizer = adamw(lr = 1e-2)  batch = 2  steps = 4  loss = causal_lm  {settings} }}
    """)
    model, _ = captured("llama", torch.float64, PACKED)
    inputs = {"input_ids": torch.randint(0, 97, (2, 11)), **PACKED}
    plain = surgery.compile(program, model=model, example_inputs=inputs)
    optimizations = {pack_rows: "attentions within documents", **p8_optimize.OPTIMIZATIONS}
    monkeypatch.setattr(p8_optimize, "OPTIMIZATIONS", optimizations)
    packed = surgery.compile(program, model=model, example_inputs=inputs)
    assert "attended = packed_attention(" in packed.source and "scaled_dot_product" not in packed.source
    for _ in range(3):
        batch = {**inputs, "labels": inputs["input_ids"]}
        torch.testing.assert_close(packed(batch).loss, plain(batch).loss, rtol=1e-10, atol=0.0)
