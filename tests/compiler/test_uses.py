"""Where graphs use weights: in every spelling of a linear product, in exported graphs and in symbolic traces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import surgery
from surgery.compiler import own_graph
from surgery.compiler.output_sizes import output_sizes
from surgery.compiler.skeleton import Skeleton
from surgery.compiler.weights import Layout, Weight

METHOD = "method m() { D = train normal(0.3)[out, in];  delta = D }\n"


class Spelt(nn.Module):
    """A parameter that is used as one of `SPELLINGS` says."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return SPELLINGS[self.use](x, self.weight)  # type: ignore[no-any-return]


SPELLINGS: dict[str, Any] = {
    "linear": lambda x, w: functional.linear(x, w),
    "transposed": lambda x, w: x @ w.T,
    "t": lambda x, w: torch.matmul(x, w.t()),
    "transpose": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "swapped": lambda x, w: torch.addmm(x.new_ones(5), x, w.transpose(-1, -2)),
    "turned": lambda x, w: functional.linear(functional.linear(x, w), w.T),  # both ways round
}


@pytest.mark.parametrize("use", SPELLINGS)
@pytest.mark.parametrize("scope", ["exported", "traced", "in place"])
def test_every_spelling_of_a_product(use: str, scope: str) -> None:
    torch.manual_seed(0)
    model, x = Spelt(use), torch.randn(3, 4)
    holder = nn.ModuleDict({"site": model}) if scope == "in place" else nn.Sequential(model)
    path = "site" if scope == "in place" else "0"
    program = surgery.parse(f"{METHOD}adapt {path} {{ with m()  strategy = branch }}\nstep {{ loss = output }}")
    weight = model.weight.detach().clone()
    if scope == "in place":
        surgery.apply(program, holder)
        found, delta = model(x), dict(model.named_parameters())["D"]
    else:
        graph = torch.export.export(holder, (x,)).module() if scope == "exported" else fx.symbolic_trace(holder)
        adapted = own_graph.rewrite(graph, surgery.plan(program, holder))
        found, delta = adapted(x), dict(adapted.named_parameters())["0.D"]
    assert bool(delta.any())
    torch.testing.assert_close(found, SPELLINGS[use](x, weight + delta))


class Leaves(nn.Module):
    """Modules that a symbolic trace calls whole."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.RMSNorm(4)
        self.kernel = nn.Conv2d(1, 6, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.scale(self.norm(self.table(ids)))
        return self.kernel(hidden.unsqueeze(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("strategy", ["branch", "fold", "recompute"])
@pytest.mark.parametrize("name", ["table", "norm", "scale", "kernel"])
def test_called_modules_are_looked_into(name: str, strategy: str) -> None:
    torch.manual_seed(0)
    model, ids = Leaves(), torch.randint(0, 7, (3, 5))
    change = "diag(v)" if name in ("norm", "scale") else "D"
    own = (
        "v = train normal(0.3)[in];  requires in == out"
        if name in ("norm", "scale")
        else "D = train normal(0.3)[out, in]"
    )
    text = f"method m() {{ {own};  delta = {change} }}\nadapt {name} {{ with m()  strategy = {strategy} }}"
    plan = surgery.plan(surgery.parse(text), model)
    adapted = own_graph.rewrite(fx.symbolic_trace(model), plan)
    tensor = dict(adapted.named_parameters())[plan.sites[0].tensors[0].key]
    stored = model.get_parameter(f"{name}.weight")
    changed = stored + (tensor.T if name == "table" else tensor.reshape(stored.shape))
    expected = torch.func.functional_call(model, {f"{name}.weight": changed}, (ids,))
    torch.testing.assert_close(adapted(ids), expected)
    (ours,) = torch.autograd.grad(adapted(ids).square().sum(), tensor)
    (wanted,) = torch.autograd.grad(expected.square().sum(), tensor)
    torch.testing.assert_close(ours, wanted)


def test_a_structure_meets_ids_as_a_matrix() -> None:
    torch.manual_seed(0)
    table, ids = nn.Embedding(6, 6), torch.randint(0, 6, (3, 5))
    text = "method m() { v = train normal(0.3)[in];  w = train normal(0.3)[in];  requires in == out\n"
    text += "delta = circ(v) @ diag(w) }\nadapt table { with m()  strategy = branch }"
    before = table.weight.detach().clone()
    model = surgery.apply(surgery.parse(text), nn.ModuleDict({"table": table}))
    v, w = (model.get_submodule("table").get_parameter(name) for name in "vw")
    circulant = torch.stack([v.roll(shift) for shift in range(6)], 1)
    torch.testing.assert_close(model.get_submodule("table")(ids), (before + (circulant @ torch.diag(w)).T)[ids])


@pytest.mark.parametrize(("path", "layout"), [
    ("table", Layout("Embedding", 4, 7, transposed=True)),
    ("norm", Layout("Norm", 4, 4)),
    ("kernel", Layout("Conv2d", 6, 6, kernel=(2, 3))),
])  # fmt: skip
def test_layouts(path: str, layout: Layout) -> None:
    found = Skeleton(Leaves()).weight(path)
    assert isinstance(found, Weight) and found.layout == layout and found.bias == (path != "table")


def test_experts_are_stored_as_their_class_says(architectures: Any) -> None:
    model = architectures["qwen3_moe"].model()
    path = "model.layers.0.mlp.experts.gate_up_proj"
    found = Skeleton(model).weight(path)
    assert isinstance(found, Weight) and found.layout == Layout("Experts", 32, 32, experts=4)
    assert found.home == f"{path}_adapter"
    del model.model.layers[0].mlp.experts.is_transposed
    assert "does not say" in str(Skeleton(model).weight(path))


def test_counts_of_a_stack(architectures: Any) -> None:
    model = architectures["qwen3_moe"].model()
    text = "adapt model.layers.0.mlp.experts.down_proj where in == 16 and out == 32 { with lora(rank = 2) }"
    (site,) = surgery.plan(surgery.parse(text), model).sites
    assert site.shape == (32, 16) and site.experts == 4 and site.trainable == 4 * 2 * (32 + 16)
    assert [tensor.shape for tensor in site.tensors] == [(4, 2, 16), (4, 32, 2)]
    with pytest.raises(surgery.SurgError, match="SURG025.*\n.*\n.*\n.*\n.*\n.*experts.gate_up_proj"):
        surgery.plan(surgery.parse("adapt model.layers.0.mlp.experts { with lora(rank = 2) }"), model)


def test_output_sizes_need_no_values(architectures: Any) -> None:
    for name in ("bert", "llama", "vit"):
        architecture = architectures[name]
        model = architecture.model()
        before, mode = torch.get_rng_state(), model.training
        found = output_sizes(model, architecture.inputs())
        assert torch.equal(torch.get_rng_state(), before) and model.training == mode
        assert not any(module._forward_hooks for module in model.modules())
        assert not any(parameter.is_meta for parameter in model.parameters())
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                assert found[path] == module.out_features
