"""Every form of the low-rank linear on a CUDA device against float64; run by `make gpu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.compiler.kernels.low_rank import choice, low_rank_linear, low_rank_linear_reference, narrow, plain, product
from surgery.compiler.kernels.low_rank.product import Tiling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
HALF = (torch.bfloat16, torch.float16)


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device="cuda").to(dtype)


def assert_close(given: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(given, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).norm() <= tolerance * other.norm()


SHAPES: dict[str, dict[str, Any]] = {
    "queries, keys and values": {"lead": (4, 300), "width": 1024, "sites": [(1024, 16), (256, 16), (256, 16)]},
    "one row": {"lead": (1,), "width": 512, "sites": [(512, 16)]},
    "few rows": {"lead": (3, 7), "width": 512, "sites": [(520, 16)]},
    "odd rows": {"lead": (1777,), "width": 520, "sites": [(264, 16), (776, 8)]},
    "rank 1": {"lead": (1024,), "width": 512, "sites": [(512, 1)]},
    "ranks 4, 64, 256": {"lead": (1024,), "width": 512, "sites": [(512, 4), (256, 64), (1024, 256)]},
    "odd ranks": {"lead": (1024,), "width": 512, "sites": [(512, 3), (512, 7)]},
    "five sites": {"lead": (1024,), "width": 256, "sites": [(256, 8)] * 5},
    "sizes that no bulk copy takes": {"lead": (1024,), "width": 517, "sites": [(263, 5)]},
    "bias": {"lead": (1024,), "width": 512, "sites": [(512, 16), (256, 16)], "bias": True},
    "dropped": {"lead": (2, 512), "width": 512, "sites": [(512, 16), (256, 16)], "dropped": True},
    "frozen input": {"lead": (1024,), "width": 512, "sites": [(512, 16)], "frozen_input": True},
    "frozen rights": {"lead": (1024,), "width": 512, "sites": [(512, 16)], "frozen_rights": True},
    "weights stored by columns": {"lead": (1024,), "width": 512, "sites": [(512, 16), (256, 16)], "columns": True},
}


def check(
    lead: tuple[int, ...], width: int, sites: Sequence[tuple[int, int]], dtype: torch.dtype, master: torch.dtype,
    bias: bool = False, dropped: bool = False, frozen_input: bool = False, frozen_rights: bool = False,
    columns: bool = False,
) -> None:  # fmt: skip
    """Values and gradients of one call are those of its definition in float64."""
    x = random(*lead, width, dtype=dtype).requires_grad_(not frozen_input)
    narrow = random(*lead, width, dtype=dtype).requires_grad_() if dropped else None
    weights = [random(width, out, dtype=dtype).T if columns else random(out, width, dtype=dtype) for out, _ in sites]
    weights = [weight.mul_(width**-0.5) for weight in weights]
    biases = [
        random(out, dtype=dtype).requires_grad_() if bias and not site else None for site, (out, _) in enumerate(sites)
    ]
    lefts = [random(out, rank, dtype=master).requires_grad_() for out, rank in sites]
    rights = [(random(rank, width, dtype=master) * width**-0.5).requires_grad_(not frozen_rights) for _, rank in sites]
    scales = [2.0**-site for site in range(len(sites))]

    def run(function: Any, convert: Any) -> tuple[list[Tensor], list[Tensor]]:
        lists = [[convert(tensor) for tensor in each] for each in (weights, biases, lefts, rights)]
        inputs = [convert(x), convert(narrow)]
        ys = function(inputs[0], *lists, scales, inputs[1])
        trained = [each for each in (*inputs, *sum(lists[1:], [])) if each is not None and each.requires_grad]
        return ys, list(torch.autograd.grad(ys, trained, [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)]))

    def exact(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

    dys = [random(*lead, out, dtype=dtype) for out, _ in sites]
    ys, found = run(low_rank_linear, lambda tensor: tensor)
    expected, wanted = run(low_rank_linear_reference, exact)
    assert_close(ys, expected, TOLERANCE[dtype])
    assert_close(found, wanted, TOLERANCE[dtype])


@pytest.fixture(params=["chosen", "Triton"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model chooses, and Triton wherever it takes the operands."""
    if request.param == "chosen":
        return
    for chooses in ("fastest_for_outputs", "fastest_for_input_gradient"):
        monkeypatch.setattr(choice, chooses, lambda *sizes: next(iter(choice.STEP)))
    for pass_ in ("narrow_product", "narrow_gradients", "right_gradients"):
        monkeypatch.setattr(
            choice, pass_, lambda wide, ranks: narrow if choice._reads_in_triton(wide, ranks) else plain
        )


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    ("dtype", "master"),
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
    + [(torch.float32, torch.float32)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_its_definition(shape: str, dtype: torch.dtype, master: torch.dtype) -> None:
    check(**SHAPES[shape], dtype=dtype, master=master)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", HALF)
def test_any_strides(dtype: torch.dtype) -> None:
    whole = random(512, 2, 1024, dtype=dtype)
    weight, left, right = random(256, 512, dtype=dtype), random(256, 16), random(16, 512)
    for x in (whole[:, 0, :512], whole[:, 1, ::2], whole.transpose(0, 1)[..., :512], random(512, 777, dtype=dtype).T):
        x, arguments = x.detach().requires_grad_(), ([weight], [None], [left], [right], [1.0])
        [y], [expected] = (
            low_rank_linear(x, *arguments),
            low_rank_linear_reference(x.double(), [weight.double()], [None], [left.double()], [right.double()], [1.0]),
        )
        assert_close([y], [expected], TOLERANCE[dtype])
        for dy in (random(y.shape[-1], *y.shape[:-1], dtype=dtype).movedim(0, -1), y.new_tensor(0.5).expand(y.shape)):
            [dx] = torch.autograd.grad(y, x, dy, retain_graph=True)
            assert_close([dx], [dy.double() @ (weight.double() + left.double() @ right.double())], TOLERANCE[dtype])


@pytest.mark.parametrize("rank", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tiling", choice.STEP)
def test_both_forms_of_the_wide_products(tiling: Tiling, dtype: torch.dtype, rank: int) -> None:
    rows, width, outs = 1000, 1032, (776, 264)
    x, u = random(rows, width, dtype=dtype), random(rows, 2 * rank, dtype=dtype)
    weights, lefts = [random(out, width, dtype=dtype) for out in outs], [random(out, rank, dtype=dtype) for out in outs]
    rights, biases = [random(rank, width, dtype=dtype) for _ in outs], [random(776, dtype=dtype), None]
    dys = [random(rows, out, dtype=dtype) for out in outs]
    parts = [u[:, :rank].double(), u[:, rank:].double()]
    ys = [
        x.double() @ weight.double().T + part @ left.double().T
        for weight, part, left in zip(weights, parts, lefts, strict=True)
    ]
    ys[0] = ys[0] + biases[0].double()  # type: ignore[union-attr]
    wide = torch.cat(dys, 1).double() @ torch.cat(weights).double()
    dx = wide + u.double() @ torch.cat(rights).double()
    for form, options in ((plain, ()), (product, (tiling,))):
        assert_close(form.outputs(x, u, weights, biases, lefts, *options), ys, TOLERANCE[dtype])
        assert_close([form.input_gradient(dys, weights, u, rights, *options)], [dx], TOLERANCE[dtype])
        assert_close([form.input_gradient(dys, weights, None, rights, *options)], [wide], TOLERANCE[dtype])


@pytest.mark.usefixtures("form")
def test_the_same_inputs_give_the_same_bits() -> None:
    x = random(2000, 1024, dtype=torch.bfloat16).requires_grad_()
    weights = [random(out, 1024, dtype=torch.bfloat16) for out in (1024, 256, 256)]
    lefts = [random(weight.shape[0], 16).requires_grad_() for weight in weights]
    rights = [random(16, 1024).requires_grad_() for _ in weights]
    dys = [random(2000, weight.shape[0], dtype=torch.bfloat16) for weight in weights]

    def run() -> list[Tensor]:
        ys = low_rank_linear(x, weights, [None] * 3, lefts, rights, [0.5] * 3)
        return [*ys, *torch.autograd.grad(ys, [x, *lefts, *rights], dys)]

    first = run()
    for _ in range(50):
        assert all(torch.equal(one, other) for one, other in zip(run(), first, strict=True))


@pytest.mark.usefixtures("form")
def test_compiled_and_captured_are_eager() -> None:
    x = random(4, 512, 1024, dtype=torch.bfloat16).requires_grad_()
    weights = [random(out, 1024, dtype=torch.bfloat16) for out in (1024, 256)]
    factors = [random(*size).requires_grad_() for size in ((1024, 16), (256, 16), (16, 1024), (16, 1024))]
    dys = [random(4, 512, weight.shape[0], dtype=torch.bfloat16) for weight in weights]

    def run(x: Tensor, *factors: Tensor) -> list[Tensor]:
        return low_rank_linear(x, weights, [None, None], factors[:2], factors[2:], [0.5, 0.25])

    def both(function: Any) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *factors)]  # on the stream that they are used on
        ys = function(*leaves)
        return [*ys, *torch.autograd.grad(ys, leaves, dys)]

    eager = both(run)
    compiled = both(torch.compile(run, fullgraph=True))
    assert all(torch.equal(one, other) for one, other in zip(compiled, eager, strict=True))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both(run)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = both(run)
    for tensor in captured:
        tensor.detach().fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, eager, strict=True))
