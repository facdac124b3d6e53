"""Capture: any module, the traps of torch.export one by one, causal masks, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgery.compiler import p5_capture
from surgery.compiler.capture.causal import ATTENTION
from surgery.compiler.diagnostics import SurgError
from surgery.compiler.graph import Graph, tensors


def attention(graph: Graph) -> list[Any]:
    """For every attention node its mask and `is_causal`."""
    nodes = [node for node in graph.module.graph.nodes if node.target is ATTENTION]
    return [
        (node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask"), node.args[5:] == (True,))
        for node in nodes
    ]


def refused(code: str, model: nn.Module, inputs: dict[str, Any], task: str | None = None) -> str:
    """The message of the one diagnostic with which capture refuses; the model is as it was."""
    modes = [module.training for module in model.modules()]
    with pytest.raises(SurgError) as caught:
        p5_capture.run(model, inputs, task)
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == [code]
    assert [module.training for module in model.modules()] == modes
    return caught.value.diagnostics[0].message


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.second = nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, /) -> Tensor:
        found: Tensor = self.second(self.drop(torch.relu(self.first(x))))
        return found


class Convolutional(nn.Module):
    """Batch norm, dropout of whole channels, an LSTM, attention, a tied weight and a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.channels = nn.Dropout2d(0.5)
        self.instance = nn.InstanceNorm1d(4, track_running_stats=True)
        self.recurrent = nn.LSTM(4, 4, 2, dropout=0.3, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)
        self.inplace = nn.Dropout(0.3, inplace=True)
        self.twice = nn.Linear(4, 4)
        self.first = nn.Linear(4, 2)
        self.second = nn.Linear(4, 2)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor([1.0, 2.0]), persistent=False)

    def forward(self, image: Tensor) -> dict[str, Any]:
        x = self.channels(self.norm(self.convolution(image))).mean(-1)
        x = self.instance(x).transpose(1, 2)
        x = self.recurrent(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.inplace(self.twice(torch.tanh(self.twice(x))))
        with torch.no_grad():
            size = self.first(x).abs().mean()
        return {"logits": self.first(x) / (1 + size), "rest": [self.second(x) * self.scale, None, size]}


def test_a_perceptron_with_positional_parameters() -> None:
    model = Perceptron()
    for rows in (1, 3):  # torch takes a size of 1 for a constant; an example of one row is no reason to
        graph = p5_capture.run(model, {"x": torch.randn(rows, 5)}, None)
        x = torch.randn(7, 5)
        (got,) = graph.module(x=x, training=False)
        assert graph.inputs == ("x",) and graph.output == "tree"
        torch.testing.assert_close(graph.rebuild([got]), model.eval()(x))


def test_a_tree_of_outputs_with_every_kind_of_mode() -> None:
    model = Convolutional()
    before = copy.deepcopy(model.state_dict())
    graph = p5_capture.run(model, {"image": torch.randn(3, 3, 9, 12)}, None)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert graph.module.state_dict().keys() == before.keys() and "scale" in tensors(graph.module)

    image = torch.randn(5, 3, 9, 12)
    twin = copy.deepcopy(model)
    found, wanted = graph.rebuild(graph.module(image=image, training=False)), twin.eval()(image)
    torch.testing.assert_close(found["logits"], wanted["logits"])
    torch.testing.assert_close(found["rest"], wanted["rest"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    torch.manual_seed(1)
    wanted = twin.train()(image)
    torch.manual_seed(1)
    found = graph.rebuild(graph.module(image=image))
    torch.testing.assert_close(found["rest"], wanted["rest"])
    for name, value in twin.state_dict().items():  # running statistics and the number of batches moved alike
        torch.testing.assert_close(model.state_dict()[name], value)
    assert model.norm.num_batches_tracked == 1

    gradients = [torch.autograd.grad(tree["logits"].sum(), tuple(one.parameters()), allow_unused=True)
                 for tree, one in ((found, model), (wanted, twin))]  # fmt: skip
    for ours, theirs in zip(*gradients, strict=True):  # `size` passes none: its region is cut out of the gradient
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_tied_and_repeated_weights_keep_their_names() -> None:
    model = Convolutional()
    graph = p5_capture.run(model, {"image": torch.randn(3, 3, 9, 12)}, "sequence_classification")
    found = tensors(graph.module)
    assert found["first.weight"] is found["second.weight"] is model.first.weight
    linears = [node for node in graph.module.graph.nodes if node.target is torch.ops.aten.linear.default]
    names = [node.args[1].target for node in linears]
    assert names.count("twice.weight") == 2 and "first.weight" in names
    tied = p5_capture.run(model, {"image": torch.randn(3, 3, 9, 12)}, None)
    names = [node.target for node in tied.module.graph.nodes if node.op == "get_attr"]
    assert {"first.weight", "second.weight"} <= set(names)


def test_a_copy_shares_tensors_and_nothing_else() -> None:
    graph = p5_capture.run(Perceptron(), {"x": torch.randn(3, 5)}, None)
    twin = graph.copy()
    assert tensors(twin.module).keys() == tensors(graph.module).keys()
    assert all(tensor is tensors(twin.module)[name] for name, tensor in tensors(graph.module).items())
    count = len(graph.module.graph.nodes)
    for node in twin.module.graph.nodes:
        node.meta["mark"] = True
    twin.module.graph.call_function(torch.relu, (next(iter(twin.module.graph.nodes)),))
    assert len(graph.module.graph.nodes) == count and not any("mark" in node.meta for node in graph.module.graph.nodes)
    x = torch.randn(2, 5)
    torch.testing.assert_close(twin.module(x, False), graph.module(x, False))
    assert twin.module(x)[0].shape == (2, 3)  # `training` may be left out


def test_right_padding_needs_no_mask(architectures: Any) -> None:
    architecture = architectures["llama"]
    model, inputs = architecture.model(), architecture.inputs(3, 9)
    graph = p5_capture.run(model, inputs, "causal_lm")
    assert attention(graph) == [(None, True)] * 2
    lengths = torch.tensor([9, 4, 6])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = inputs["input_ids"] * mask
    got, expected = graph.module(input_ids=ids, training=False), model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


def test_a_mask_that_is_given_stays(architectures: Any) -> None:
    architecture = architectures["llama"]
    inputs = architecture.inputs(3, 9)
    graph = p5_capture.run(architecture.model(), inputs | {"attention_mask": torch.ones(3, 9).long()}, "causal_lm")
    assert all(mask is not None and not causal for mask, causal in attention(graph))


def test_packed_rows_stay_apart(architectures: Any) -> None:
    architecture = architectures["llama"]
    model, inputs = architecture.model(), architecture.inputs(3, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 3)
    graph = p5_capture.run(model, {**inputs, "position_ids": torch.arange(9).expand(3, 9)}, "causal_lm")
    assert all(mask is not None for mask, _ in attention(graph))  # it depends on position_ids
    got = graph.module(**inputs, position_ids=positions, training=False)
    alone = torch.cat([model(inputs["input_ids"][:, :4]).logits, model(inputs["input_ids"][:, 4:]).logits], 1)
    torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "causal"), [(6, False), (4096, False), (None, True)])
def test_a_sliding_window_is_no_plain_causal_mask(architectures: Any, window: int | None, causal: bool) -> None:
    architecture = architectures["mistral"]
    model, inputs = architecture.model(sliding_window=window), architecture.inputs(3, 9)
    graph = p5_capture.run(model, inputs, "causal_lm")
    assert [(mask is None, flag) for mask, flag in attention(graph)] == [(causal, causal)] * 2
    inputs = architecture.inputs(2, 17)
    torch.testing.assert_close(graph.module(**inputs, training=False), model(**inputs).logits, rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    """Attention with a mask of a given make."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make
        self.linear = nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=self.make(self, x)).transpose(1, 2)


def triangle(self: Attention, x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def additive(self: Attention, x: Tensor) -> Tensor:
    return torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)


def finite(self: Attention, x: Tensor) -> Tensor:
    return torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1).expand(x.shape[0], 1, -1, -1)


def soft(self: Attention, x: Tensor) -> Tensor:
    return torch.full((x.shape[1], x.shape[1]), -2.0).triu(1)


def learned(self: Attention, x: Tensor) -> Tensor:
    return additive(self, x) + self.bias


def by_value(self: Attention, x: Tensor) -> Tensor:
    return torch.where(x[:, None, None, :, 0] > -100.0, additive(self, x), -1.0)


def everything(self: Attention, x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)


def strided(self: Attention, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    return (places[None] <= places[:, None]) & ((places[:, None] - places[None]) < 100)


@pytest.mark.parametrize(
    ("make", "masked", "causal"),
    [
        (triangle, False, True),
        (additive, False, True),
        (finite, False, True),
        (everything, False, False),
        (soft, True, False),
        (learned, True, False),
        (by_value, True, False),
        (strided, True, False),
    ],
)
def test_only_what_is_proved_is_replaced(make: Any, masked: bool, causal: bool) -> None:
    model = Attention(make)
    graph = p5_capture.run(model, {"x": torch.randn(3, 6, 8)}, None)
    assert [(mask is not None, flag) for mask, flag in attention(graph)] == [(masked, causal)]
    x = torch.randn(2, 120, 8)
    torch.testing.assert_close(graph.module(x=x, training=False)[0], model(x))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.linear, x, use_reentrant=False)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_activation_checkpointing_is_reported(architectures: Any) -> None:
    model = architectures["llama"].model()
    model.gradient_checkpointing_enable()
    model.eval()
    graph = p5_capture.run(model, architectures["llama"].inputs(), "causal_lm")
    assert [(found.code, found.severity) for found in graph.warnings] == [("SURG056", "warning")]
    assert model.model.layers[0].gradient_checkpointing
    graph = p5_capture.run(Checkpointed(), {"x": torch.randn(3, 5)}, None)
    assert [found.code for found in graph.warnings] == ["SURG056"]
    assert p5_capture.run(Perceptron(), {"x": torch.randn(3, 5)}, None).warnings == ()


class Branching(nn.Module):
    """What torch.export cannot capture, or captures as something else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(5, 5)
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        y = self.linear(x)
        if self.kind == "value" and y.sum() > 0:
            y = -y
        if self.kind == "mode" and self.training:
            y = y * 2
        if self.kind == "functional dropout":
            y = nn.functional.dropout(y, 0.9)
        if self.kind == "batch":
            y = y.view(3, 5)
        result: Tensor = y
        return result


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("value", "torch.export cannot capture Branching"),
        ("mode", "does not compute what the model computes in evaluation mode"),
        ("functional dropout", "does not compute what the model computes in evaluation mode"),
        ("batch", "the batch of `x` cannot stay dynamic"),
    ],
)
def test_what_cannot_be_captured_is_refused_and_leaves_no_trace(kind: str, message: str) -> None:
    model = Branching(kind).eval()
    assert message in refused("SURG040", model, {"x": torch.randn(3, 5)})
    assert model.seen is None and not model.training


class Pair(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other


def test_inputs_that_do_not_fit_are_refused() -> None:
    x = torch.randn(3, 5)
    assert "no example inputs" in refused("SURG042", Perceptron(), {})
    assert "no parameter `y`" in refused("SURG042", Perceptron(), {"x": x, "y": x})
    assert "needs `other`" in refused("SURG042", Pair(), {"x": x})
    assert "not a tensor" in refused("SURG042", Perceptron(), {"x": 3})
    assert "`training`" in refused("SURG042", Perceptron(), {"training": x})


def test_a_task_needs_logits() -> None:
    class NoLogits(Perceptron):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    assert "gives no `logits`" in refused("SURG031", NoLogits(), {"x": torch.randn(3, 5)}, "sequence_classification")


def test_frozen_parameters_and_inference_mode_change_nothing(architectures: Any) -> None:
    architecture = architectures["bert"]
    model = architecture.model()
    model.requires_grad_(False)
    with torch.no_grad():
        graph = p5_capture.run(model, architecture.inputs(), architecture.task)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.classifier.weight.requires_grad_(True)
    assert graph.module(**architecture.inputs(2, 5)).requires_grad


def test_a_model_on_the_meta_device(architectures: Any) -> None:
    architecture = architectures["llama"]
    model = architecture.model().to("meta")
    graph = p5_capture.run(model, architecture.inputs(), "causal_lm")
    assert all(tensor.is_meta for tensor in tensors(graph.module).values())
    assert attention(graph) == [(None, True)] * 2


def test_hidden_states_are_an_output() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=16)).eval()  # fmt: skip
    inputs = {"input_ids": torch.randint(0, 50, (3, 7)), "attention_mask": torch.ones(3, 7).long()}
    graph = p5_capture.run(model, inputs, "feature_extraction")
    torch.testing.assert_close(graph.module(**inputs, training=False), model(**inputs).last_hidden_state)
