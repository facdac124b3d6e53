"""One block of each kind is captured and stands for the others: the graph of the whole model, or none at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.compiler import p5_capture
from surgery.compiler.capture.alike import Unread, Unreadable
from surgery.compiler.capture.repeated import Repeated
from surgery.compiler.emit.forward import forward_source
from surgery.compiler.graph import Graph

LAYERS = 6
# Architecture, the setting that says how many layers there are, and how many blocks are captured.
KINDS = [("llama", "num_hidden_layers", 1), ("gemma2", "num_hidden_layers", 2), ("gpt2", "n_layer", 1),
         ("bert", "num_hidden_layers", 2), ("vit", "num_hidden_layers", 1), ("t5", "num_layers", 3)]  # fmt: skip


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Graph, Graph, Any]]:
    """Captures a model from its kinds of blocks and whole; the third is what was captured, None at a doubt."""

    def capture(model: nn.Module, inputs: dict[str, Tensor], task: str | None) -> tuple[Graph, Graph, Any]:
        seen: list[Any] = []
        original, repeated = p5_capture._once_per_kind, Repeated

        def watched(wrapper: Any, given: Any) -> Any:
            def made(inner: nn.Module) -> Any:
                seen.append(repeated(inner))
                return seen[-1]

            monkeypatch.setattr(p5_capture, "Repeated", made)
            found = original(wrapper, given)
            if found is None:
                seen.clear()
            return found

        monkeypatch.setattr(p5_capture, "_once_per_kind", watched)
        short = p5_capture.run(model, inputs, task)
        monkeypatch.setattr(p5_capture, "_once_per_kind", lambda *_: None)
        whole = p5_capture.run(model, inputs, task)
        monkeypatch.undo()
        return short, whole, seen[0] if seen else None

    return capture


def results(graph: Graph, inputs: dict[str, Tensor], *, training: bool) -> list[Tensor]:
    """The output of a graph and the gradients of all its parameters, from one seed."""
    torch.manual_seed(3)
    outputs = graph.module(**inputs, training=training)
    output = outputs if isinstance(outputs, Tensor) else outputs[0]
    parameters = [parameter for _, parameter in sorted(graph.module.named_parameters()) if parameter.requires_grad]
    found = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
    return [output, *(torch.zeros(()) if gradient is None else gradient for gradient in found)]


def assert_same(short: Graph, whole: Graph, inputs: dict[str, Tensor]) -> None:
    """To the bit, in training with dropout and in evaluation."""
    for training in (True, False):
        pairs = zip(results(short, inputs, training=training), results(whole, inputs, training=training), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize(("name", "setting", "kinds"), KINDS)
def test_the_graph_is_that_of_the_whole_model(
    architectures: Any, once: Any, name: str, setting: str, kinds: int
) -> None:
    architecture = architectures[name]
    more = {"layer_types": None} if name == "gemma2" else {"num_decoder_layers": LAYERS} if name == "t5" else {}
    model = architecture.model(0.1, **{setting: LAYERS}, **more)
    short, whole, repeated = once(model, architecture.inputs(), architecture.task)
    assert len(repeated.kinds) == kinds
    assert forward_source(short).source == forward_source(whole).source
    ours, theirs = (list(graph.module.graph.nodes) for graph in (short, whole))
    assert [(node.op, str(node.target)) for node in ours] == [(node.op, str(node.target)) for node in theirs]
    for one, other in zip(ours, theirs, strict=True):
        paths = [[path for path, _ in node.meta["nn_module_stack"].values()] for node in (one, other)]
        assert paths[0] == paths[1] and str(one.meta.get("val")) == str(other.meta.get("val"))
    assert_same(short, whole, architecture.inputs(3, 7))


class Block(nn.Module):
    """A linear layer with dropout and a norm that counts, which knows its own number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("shift", torch.full((6,), float(number)))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        found: Tensor = x + self.drop(torch.relu(self.norm(self.linear(x)) + self.shift)) * scale
        return found


class Stack(nn.Module):
    """Five of them."""

    def __init__(self, kind: type[nn.Module] = Block) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(kind(number) for number in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(0))}


def test_blocks_with_running_statistics_and_buffers_of_their_own(once: Any) -> None:
    model = Stack()
    short, whole, repeated = once(model, inputs(), None)
    assert len(repeated.kinds) == 1 and len(repeated.calls) == 4
    assert forward_source(short).source == forward_source(whole).source
    before = [buffer.clone() for buffer in model.buffers()]
    found = []
    for graph in (short, whole):
        found.append([*results(graph, inputs(), training=True), *(buffer.clone() for buffer in model.buffers())])
        for buffer, content in zip(model.buffers(), before, strict=True):
            buffer.copy_(content)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_what_is_around_the_blocks_may_differ_from_one_to_the_next(once: Any) -> None:
    class Around(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = early = self.first(x)
            for number, block in enumerate(self.blocks):
                x = block(x * (number + 1), 0.5 if number == 3 else 1.0)
                if number == 2:
                    x = x + early.sin()
            return x

    short, whole, repeated = once(Around(), inputs(), None)
    assert len(repeated.kinds) == 2  # the fourth is given another number
    assert_same(short, whole, inputs())


def test_blocks_that_write_into_their_argument_are_captured_one_by_one(once: Any) -> None:
    class Writes(Block):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x.mul_(2) + super().forward(x)

    short, whole, repeated = once(Stack(Writes), inputs(), None)
    assert repeated is None
    assert_same(short, whole, inputs())


def reads_its_number() -> nn.Module:
    class Reads(Block):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) / (self.number + 1)

    return Stack(Reads)


def asks_for_its_number() -> nn.Module:
    class Asks(Block):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            try:
                return super().forward(x) * (2.0 if self.number == 3 else 1.0)
            except Exception:
                return x

    return Stack(Asks)


def leaves_something_behind() -> nn.Module:
    class Leaves(Block):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            self.last = super().forward(x)
            return self.last

    class Collects(Stack):
        def forward(self, x: Tensor) -> Tensor:
            total: Tensor = super().forward(x) + sum(block.last for block in self.blocks)  # type: ignore[misc]
            return total

    return Collects(Leaves)


def fills_a_list() -> nn.Module:
    class Fills(Block):
        def forward(self, x: Tensor, seen: Any = None) -> Tensor:
            seen.append(x)
            return super().forward(x)

    class Collects(Stack):
        def forward(self, x: Tensor) -> Tensor:
            seen: list[Tensor] = []
            x = self.first(x)
            for block in self.blocks:
                x = block(x, seen)
            return x + torch.stack(seen).sum(0)

    return Collects(Fills)


def reads_another_module() -> nn.Module:
    class Reads(Block):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            others: Any = self.others
            found: Tensor = super().forward(x) * others[0].weight[0]
            return found

    model = Stack(Reads)
    for block in model.blocks:
        block.__dict__["others"] = [model.first]
    return model


def has_a_hook() -> nn.Module:
    model = Stack()
    model.blocks[3].linear.register_forward_hook(lambda module, given, output: output * 2)  # type: ignore[union-attr]
    return model


def is_called_twice() -> nn.Module:
    class Plain(Block):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x + torch.tanh(self.linear(x))

    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    return Twice(Plain)


def one_is_changed() -> nn.Module:
    model = Stack()
    block = model.blocks[3]
    block.forward = lambda x: x + block.linear(x)  # type: ignore[operator]
    return model


@pytest.mark.parametrize(
    "model", [reads_its_number, asks_for_its_number, leaves_something_behind, fills_a_list, reads_another_module,
              is_called_twice],
)  # fmt: skip
def test_at_a_doubt_the_whole_model_is_captured(once: Any, model: Callable[[], nn.Module]) -> None:
    made = model()
    fields = [dict(module.__dict__) for module in made.modules()]
    short, whole, repeated = once(made, inputs(), None)
    assert repeated is None
    assert_same(short, whole, inputs())
    assert [dict(module.__dict__) for module in made.modules()] == fields


@pytest.mark.parametrize("model", [has_a_hook, one_is_changed])
def test_a_block_that_somebody_changed_is_captured_beside_the_others(once: Any, model: Callable[[], nn.Module]) -> None:
    short, whole, repeated = once(model(), inputs(), None)
    assert len(repeated.kinds) == 1 and len(repeated.calls) == 3
    assert_same(short, whole, inputs())


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.drop, "p", 0.1),
        lambda block: setattr(block.norm, "momentum", 0.3),
        lambda block: setattr(block, "linear", nn.Linear(6, 6, bias=False)),
        lambda block: setattr(block, "drop", nn.Identity()),
        lambda block: block.linear.weight.requires_grad_(False),
        lambda block: setattr(block, "note", "a block"),
        lambda block: setattr(block, "table", {"a": [1, 2.0]}),
    ],
)
def test_a_block_with_anything_else_about_it_is_of_another_kind(once: Any, change: Callable[[Any], None]) -> None:
    model = Stack()
    change(model.blocks[2])
    short, whole, repeated = once(model, inputs(), None)
    assert len(repeated.calls) == 3 and "blocks.2" not in repeated.calls
    assert_same(short, whole, inputs())


USES: list[Callable[[Any], Any]] = [
    lambda number: number + 1, lambda number: 1 / number, lambda number: number == 2, lambda number: number < 2,
    bool, str, float, hash, round, range, abs, lambda number: [1, 2, 3][number], lambda number: {1: 2}[number],
    lambda number: f"{number}", lambda number: number in (1, 2), lambda number: number % 2,
    lambda number: number.bit_length(), lambda number: 2**number, lambda number: number != 1,
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_nothing_can_be_asked_of_a_number_that_blocks_do_not_share(use: Callable[[Any], Any]) -> None:
    with pytest.raises(Unread):
        use(Unreadable())
