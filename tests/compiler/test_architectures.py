"""Every architecture of the matrix: the captured graph is the model, in training and in evaluation, at other sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgery.compiler.capture.causal import ATTENTION
from surgery.compiler.graph import tensors

CAUSAL = {"llama", "qwen2", "qwen3", "mistral", "qwen3_moe", "gpt2", "opt"}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter that the loss reaches, by name."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def seeded(function: Any, **inputs: Any) -> Any:
    torch.manual_seed(5)
    return function(**inputs)


def test_names_and_storage_are_the_models(architecture: Any, captured: Any) -> None:
    model, graph = captured(architecture)
    ours, theirs = tensors(graph.module), tensors(model)
    assert all(ours[name] is tensor for name, tensor in theirs.items())
    for name in set(ours) - set(theirs):  # constants of the forward: no parameters, under the path that made them
        assert not isinstance(ours[name], nn.Parameter) and name.rpartition(".")[2].startswith("lifted")
    assert graph.module.state_dict().keys() == model.state_dict().keys()
    for node in graph.module.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output") and "nn_module_stack" in node.meta
        assert node.op != "get_attr" or node.target in ours
    paths = {path for path, _ in model.named_modules()}
    for node in graph.module.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            path, _ = list(node.meta["nn_module_stack"].values())[-1]
            assert path in paths and node.args[1].target.startswith(path), (path, node.args[1].target)


def test_the_graph_is_the_model(architecture: Any, captured: Any) -> None:
    model, graph = captured(architecture)
    for rows, length in ((4, 9), (1, 5), (2, 23)):
        inputs = architecture.inputs(rows, length)
        for training in (True, False):
            expected = seeded(model.train(training), **inputs).logits
            got = seeded(graph.module, **inputs, training=training)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    model.train()
    wanted = gradients(model, seeded(model, **inputs).logits.square().mean())
    found = gradients(model, seeded(graph.module, **inputs).square().mean())
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    if architecture.name != "opt":
        torch.manual_seed(6)
        assert not torch.allclose(graph.module(**inputs), seeded(graph.module, **inputs))  # dropout is live
    model.eval()


def test_causal_attention_is_restored(architecture: Any, captured: Any) -> None:
    _, graph = captured(architecture)
    nodes = [node for node in graph.module.graph.nodes if node.target is ATTENTION]
    causal = [node for node in nodes if node.args[3] is None and node.args[5] is True]
    if architecture.name in CAUSAL:
        assert nodes and causal == nodes
        assert not any(node.target is torch.ops.aten.le.Tensor for node in graph.module.graph.nodes)  # the mask is gone
    else:  # Gemma-2 has a sliding window in every other layer, and with some attention implementations no such node
        assert len(causal) < len(nodes) or not nodes


def test_it_compiles_whole(architectures: Any, captured: Any) -> None:
    architecture = architectures["llama"]
    _, graph = captured(architecture)
    compiled: Any = torch.compile(graph.module, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, length in ((3, 9), (2, 5)):
        inputs = architecture.inputs(rows, length)
        torch.testing.assert_close(
            compiled(**inputs, training=False), graph.module(**inputs, training=False), rtol=1e-5, atol=1e-5
        )
    torch._dynamo.reset()
