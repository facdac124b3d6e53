"""Methods for sparse models: what is zero stays zero, gradients are those of the papers, and nothing dense is kept."""

from __future__ import annotations

import copy
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery

pytestmark = pytest.mark.usefixtures("captured_once")

IN, OUT, RANK, ROWS = 24, 16, 4, 12
SPEC = importlib.util.spec_from_file_location("sparse_reference", Path(__file__).parent / "references" / "sparse.py")
assert SPEC is not None and SPEC.loader is not None
REFERENCE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(REFERENCE)


def two_of_four(weight: Tensor) -> Tensor:
    """The two largest of every four neighbours in a row."""
    groups = weight.abs().reshape(weight.shape[0], -1, 4)
    smallest = groups.topk(2, dim=-1, largest=False).indices
    return torch.ones_like(groups).scatter(-1, smallest, 0.0).reshape(weight.shape)


def unstructured(weight: Tensor) -> Tensor:
    """The larger half of all entries."""
    return (weight.abs() >= weight.abs().median()).to(weight.dtype)


class Model(nn.Module):
    """Two layers; their weights are pruned."""

    def __init__(self, prune: Callable[[Tensor], Tensor] = two_of_four, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, 8, bias=False)
        with torch.no_grad():
            for layer in (self.up, self.down):
                layer.weight.mul_(prune(layer.weight))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., 8]`."""
        found: Tensor = self.down(torch.tanh(self.up(x)))
        return found


def batch(seed: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Rows and what to predict."""
    generator = torch.Generator().manual_seed(seed)
    x, labels = (torch.randn(ROWS, size, generator=generator, dtype=torch.float64).to(dtype) for size in (IN, 8))
    return {"x": x, "labels": labels}


def step_of(
    method: str, options: str = "", model: nn.Module | None = None, optimizer: str = "adamw(lr = 1e-2)",
    compiled: str = "off", more: str = "",
) -> Any:  # fmt: skip
    """A step on the sparse model."""
    model = model or Model()
    program = surgery.parse(f"""
        adapt {{up,down}} {{ with {method}  {options} }}
        step {{ optimizer = {optimizer}  batch = {ROWS}  steps = 30  loss = mse  adapter_dtype = float64
                compile = {compiled}  {more} }}
    """)
    dtype = next(model.parameters()).dtype
    calibration = [batch(seed, dtype) for seed in (5, 6)] if method.startswith("lors") else None
    example = {"x": batch(dtype=dtype)["x"]}
    return surgery.compile(program, model=model, example_inputs=example, calibration=calibration)


@pytest.mark.parametrize("prune", [two_of_four, unstructured])
@pytest.mark.parametrize(
    "method", ["lors(rank = 4)", "lors(rank = 4, exact = true)", "sqft(rank = 4)", "spp(rank = 4)"]
)
def test_every_zero_is_kept_through_training_and_merging(method: str, prune: Callable[[Tensor], Tensor]) -> None:
    model = Model(prune)
    base, step = copy.deepcopy(model), step_of(method, model=model)
    assert all(site.facts.keeps_zeros for site in step.plan.sites)
    assert torch.equal(step.forward(x=batch()["x"]), base(batch()["x"])), "the start is the sparse model"
    losses = [float(step(batch()).loss) for _ in range(20)]
    assert losses[-1] < losses[0]
    merged = step.merge()
    for name in ("up", "down"):
        before, after = base.get_submodule(name).weight, merged.get_submodule(name).weight
        assert isinstance(before, Tensor) and isinstance(after, Tensor)
        assert not after[before == 0].any() and (before == 0).any()
        assert ((after != before) & (before != 0)).sum() > 0.9 * (before != 0).sum()
    torch.testing.assert_close(merged(batch()["x"]), step.forward(x=batch()["x"]), rtol=1e-9, atol=1e-9)


def gradients(step: Any, site: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What plain SGD moves a site's tensors by, and the site's x and dy, which a plain model with its weights gives."""
    before = {name: value.detach().clone() for name, value in step.parameters_by_site[site].items()}
    model = Model()
    with torch.no_grad():
        for name in ("up", "down"):
            model.get_submodule(name).weight.copy_(step.effective_weight(name))  # type: ignore[operator]
    seen: dict[str, Tensor] = {}
    model.get_submodule(site).register_forward_hook(lambda _, inputs, y: seen.update(x=inputs[0], y=y))
    data = batch()
    loss = torch.nn.functional.mse_loss(model(data["x"]), data["labels"])
    (dy,) = torch.autograd.grad(loss, seen["y"])
    step(data)
    after = step.parameters_by_site[site]
    return {name: before[name] - after[name].detach() for name in before}, seen["x"].detach(), dy


def moved(method: str, options: str = "") -> Any:
    """A step whose tensors are away from their starts."""
    step = step_of(method, options, optimizer="sgd(lr = 1.0)")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensors in step.parameters_by_site.values():
            for value in tensors.values():
                value.copy_(0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return step


@pytest.mark.parametrize("strategy", ["branch", "fold", "recompute"])
@pytest.mark.parametrize("site", ["up", "down"])
def test_lors_has_the_released_gradient(strategy: str, site: str) -> None:
    """dA = dY.T (X B.T), dB = (dY A).T X, without mask and without scale (pefts/lors/lors_autograd.py)."""
    step = moved(f"lors(rank = {RANK})", f"strategy = {strategy}")
    tensors = {name: value.detach().clone() for name, value in step.parameters_by_site[site].items()}
    found, x, dy = gradients(step, site)
    A, B = tensors["A"], tensors["B"]
    torch.testing.assert_close(found["A"], dy.T @ (x @ B.T), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["B"], (dy @ A).T @ x, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found["A"], 2 * dy.T @ (x @ B.T))


@pytest.mark.parametrize("strategy", ["branch", "fold", "recompute"])
@pytest.mark.parametrize(("method", "reference", "parameters"), [
    (f"lors(rank = {RANK}, exact = true)", "lors", {"rank": RANK, "alpha": RANK, "exact": True}),
    (f"sqft(rank = {RANK})", "sqft", {"rank": RANK, "alpha": 2 * RANK}),
    (f"spp(rank = {RANK})", "spp", {"rank": RANK, "alpha": 2 * RANK}),
    (f"lors(rank = {RANK})", "lors", {"rank": RANK, "alpha": RANK, "exact": False}),
])  # fmt: skip
def test_gradients_are_those_of_autograd_through_the_equation(
    strategy: str, method: str, reference: str, parameters: dict[str, float]
) -> None:
    step = moved(method, f"strategy = {strategy}")
    leaves = {name: value.detach().clone().requires_grad_() for name, value in step.parameters_by_site["up"].items()}
    base = Model().up.weight.detach()
    weight = getattr(REFERENCE, reference)(base, leaves, parameters)
    torch.testing.assert_close(step.effective_weight("up"), weight.detach(), rtol=1e-12, atol=1e-12)
    found, x, dy = gradients(step, "up")
    torch.autograd.backward(weight, dy.T @ x)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-9, atol=1e-10)


def test_the_start_of_lors_is_the_best_rank_of_the_gradient() -> None:
    """B has orthonormal rows that span the leading right singular vectors of the dense gradient; A is zero."""
    model = Model()
    step = step_of(f"lors(rank = {RANK})", model=model)
    tensors = step.parameters_by_site["up"]
    assert not tensors["A"].any()
    B = tensors["B"].detach()
    torch.testing.assert_close(B @ B.T, torch.eye(RANK, dtype=B.dtype), rtol=1e-5, atol=1e-5)
    reference, total = copy.deepcopy(model), torch.zeros(OUT, IN, dtype=torch.float64)
    for seed in (5, 6):
        reference.zero_grad()
        data = batch(seed)
        torch.autograd.backward(torch.nn.functional.mse_loss(reference(data["x"]), data["labels"]))
        gradient = reference.up.weight.grad
        assert gradient is not None
        total += gradient
    leading = torch.linalg.svd(total).Vh[:RANK]
    torch.testing.assert_close(B.T @ B, leading.T @ leading, rtol=1e-4, atol=1e-4)


def test_a_dense_model_gets_a_mask_from_its_largest_entries() -> None:
    """`topk_mask(abs(W), 0.5) * lora(...)`: the smaller half of W stays as it is."""
    model = Model(prune=torch.ones_like)
    base = copy.deepcopy(model)
    step = step_of("topk_mask(abs(W), 0.5) * lora(rank = 4)", model=model)
    for _ in range(20):
        step(batch())
    for name in ("up", "down"):
        before = base.get_parameter(f"{name}.weight").detach()
        after = step.merge().get_parameter(f"{name}.weight").detach()
        largest = before.abs() >= before.abs().flatten().sort().values[before.numel() // 2]
        assert torch.equal(after[~largest], before[~largest]) and largest.sum() == before.numel() // 2
        assert (after[largest] != before[largest]).all()


# --- how a recomputed site lives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lors(rank = 4)", "sqft(rank = 4)"])
def test_step_py_shows_the_weight_as_a_function(method: str) -> None:
    step = step_of(method, "strategy = recompute")
    name = f"{method.partition('(')[0]}_{'weight' if 'lors' in method else 'linear'}"
    assert f"def {name}(" in step.source
    call = "rebuilt_linear(" if "lors" in method else "checkpoint("
    assert step.source.count(call) == 2
    assert "import rebuilt_linear" in step.source if "lors" in method else "import checkpoint" in step.source


@pytest.mark.parametrize("method", ["lors(rank = 4)", "sqft(rank = 4)"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_recompute_trains_as_fold_does(method: str, dtype: torch.dtype) -> None:
    losses = []
    for strategy in ("fold", "recompute"):
        step = step_of(method, f"strategy = {strategy}", Model(dtype=dtype))
        losses.append([float(step(batch(dtype=dtype)).loss) for _ in range(6)])
    exact = dtype == torch.float64
    assert losses[0] == pytest.approx(losses[1], rel=1e-12 if exact else 3e-2)


@pytest.mark.parametrize("method", ["lors(rank = 4)", "sqft(rank = 4)"])
def test_recompute_under_autocast_is_close_to_fold(method: str) -> None:
    losses = []
    for strategy in ("fold", "recompute"):
        step = step_of(method, f"strategy = {strategy}", Model(dtype=torch.float32), more="precision = bfloat16")
        losses.append([float(step(batch(dtype=torch.float32)).loss) for _ in range(6)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("method", ["lors(rank = 4)", "sqft(rank = 4)"])
def test_recompute_compiles_without_a_graph_break(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_function, changed = torch.compile, {"backend": "aot_eager", "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_function(function, **options | changed))
    losses = []
    for compiled in ("off", "on"):
        step = step_of(method, "strategy = recompute", compiled=compiled)
        losses.append([float(step(batch()).loss) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("method", ["spp(rank = 4)", "sqft(rank = 4)", "lora(rank = 4)"])
def test_recompute_in_module_scope_copies_saves_and_compiles(method: str) -> None:
    model = Model()
    program = surgery.parse(f"adapt {{up,down}} {{ with {method}  strategy = recompute }}")
    adapted = surgery.apply(program, model)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2)
    x = batch()["x"]
    folded = surgery.apply(surgery.parse(f"adapt {{up,down}} {{ with {method}  strategy = fold }}"), Model())
    folded.load_state_dict(adapted.state_dict())
    expected = adapted(x)
    torch.testing.assert_close(expected, folded(x))
    twin = copy.deepcopy(adapted)
    stored = io.BytesIO()
    torch.save(adapted, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    compiled = torch.compile(copy.deepcopy(adapted), backend="aot_eager")
    wanted = grads(adapted, x)
    for other in (twin, loaded, folded, compiled):
        torch.testing.assert_close(other(x), expected)
        for ours, theirs in zip(grads(other, x), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        next(parameter for parameter in twin.parameters() if parameter.requires_grad).add_(1.0)
    assert not torch.allclose(twin(x), expected), "a copy has tensors of its own"


def grads(model: Any, x: Tensor) -> list[Tensor]:
    """The gradients of everything trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(model(x).square().sum(), trained))
