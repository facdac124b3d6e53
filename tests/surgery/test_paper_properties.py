"""The property that makes each paper, as a test of its own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import surgery
from tests.off_start import off_start

pytestmark = pytest.mark.usefixtures("captured_once")

SPECS = Path(__file__).resolve().parents[2] / "specs"


class Stack(nn.Module):
    """Linears one after the other, in float64."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])
        self.double()

    def forward(self, features: Tensor) -> Tensor:
        """`[rows, first]` to `[rows, last]`."""
        for block in self.blocks:
            features = torch.tanh(block(features))
        return features


def adapted(call: str, *sizes: int, method: str = "", strategy: str = "") -> tuple[nn.Module, Any]:
    """Linears of these sizes, and a step that adapts all of them with every trained tensor off its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Stack(*sizes)
    program = surgery.parse(f"""
        {method}
        adapt blocks.* {{ with {call} {strategy} }}
        step {{ optimizer = sgd(lr = 0.01)  batch = 2  steps = 1  loss = cross_entropy  compile = off }}
    """)
    step = surgery.compile(program, model=model, example_inputs={"features": features(sizes[0])})
    off_start(step, 1.0, seed=1)
    return model, step


def features(size: int) -> Tensor:
    return torch.randn(5, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def change(model: nn.Module, step: Any, path: str = "blocks.0") -> Tensor:
    """What the effective weight has more than W."""
    found: Tensor = step.effective_weight(path).detach() - model.get_parameter(f"{path}.weight").detach()
    return found


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-10))


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the name of every operation, and the shapes of what it makes anew: views are left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.made.append((str(func), tuple(leaf.shape)))
        return result


def operations(step: Any, size: int) -> list[tuple[str, tuple[int, ...]]]:
    """What one forward runs."""
    with torch.no_grad(), Operations() as seen:
        step.forward(features=features(size))
    made: list[tuple[str, tuple[int, ...]]] = seen.made
    return made


# --- rank beyond LoRA's -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "lora", "reached"),
    [
        ("hira(rank = 2)", 2, 24),
        ("loha(rank = 3)", 6, 9),
        ("abba(rank = 3)", 6, 9),
        ("gralora(rank = 4, k = 2)", 4, 8),
        ("mora(rank = 3)", 3, 12),
        ("melora(rank = 1, groups = 8)", 1, 8),
    ],
)
def test_the_rank_is_higher_than_loras_at_an_equal_count(call: str, lora: int, reached: int) -> None:
    model, step = adapted(call, 24, 24)
    base, plain = adapted(f"lora(rank = {lora})", 24, 24)
    assert step.plan.totals.trainable == plain.plan.totals.trainable
    assert rank(change(base, plain)) == lora < reached == rank(change(model, step))


def test_randlora_has_full_rank() -> None:
    model, step = adapted("randlora(rank = 5)", 20, 28)
    assert rank(change(model, step)) == 20
    assert step.plan.totals.trainable == 4 * 5 + 4 * 20  # four terms


def test_c3a_has_full_rank_from_fewer_numbers_than_a_lora_of_rank_1() -> None:
    model, step = adapted("c3a(block = 24)", 24, 24)
    assert step.plan.totals.trainable == 24 < 48
    assert rank(change(model, step)) == 24


# --- structure --------------------------------------------------------------------------------------------------------


def test_c3a_is_circulant_in_every_block() -> None:
    model, step = adapted("c3a(block = 4)", 12, 8)
    blocks = change(model, step).reshape(2, 4, 3, 4).transpose(1, 2)
    torch.testing.assert_close(blocks.roll((1, 1), (2, 3)), blocks)
    assert len(set(blocks.flatten().mul(1e9).round().tolist())) == 2 * 3 * 4  # nothing else is equal


@pytest.mark.parametrize(
    ("method", "call", "displacement"),
    [
        ("", "circulant()", 1),
        ("method one() { c = train zeros[out]; r = train zeros[in]; delta = toeplitz(c, r) }", "one()", 2),
        ("", "toeplitz()", 4),  # a product of two
    ],
)
def test_the_displacement_rank_of_a_structured_matrix(method: str, call: str, displacement: int) -> None:
    """The rank of Z1 M - M Z0 for the cyclic and the plain shift: it is that small for no dense matrix."""
    model, step = adapted(call, 12, 12, method=method)
    shift = torch.diag(torch.ones(11, dtype=torch.float64), -1)
    cyclic = shift.clone()
    cyclic[0, -1] = 1
    matrix = change(model, step)
    assert rank(cyclic @ matrix - matrix @ shift) == displacement < rank(matrix) == 12


def test_fourierft_has_no_spectrum_off_its_positions() -> None:
    model, step = adapted("fourierft(frequencies = 10)", 12, 8)
    chosen = step.parameters_by_site["blocks.0"]["E"]
    assert len(chosen.unique()) == 10 and not chosen.is_floating_point()
    allowed = torch.zeros(8, 12, dtype=torch.bool)
    for row, column in zip((chosen // 12).tolist(), (chosen % 12).tolist(), strict=True):
        allowed[row, column] = allowed[-row, -column] = True  # the real part has the mirror image too
    spectrum = torch.fft.fft2(change(model, step)).abs()
    assert spectrum[~allowed].max() < 1e-10 * spectrum.max()
    assert bool((spectrum[allowed] > 1e-3 * spectrum.max()).all())


def test_miss_gives_inputs_of_one_remainder_one_column() -> None:
    model, step = adapted("miss(rank = 5)", 13, 8)
    matrix = change(model, step)
    assert step.plan.totals.trainable == 8 * 5
    for column in range(13):
        torch.testing.assert_close(matrix[:, column], matrix[:, column % 5])


def test_lokr_is_one_matrix_at_several_scales() -> None:
    model, step = adapted("lokr(rank = 2, factor = 3)", 12, 9)
    blocks = change(model, step).reshape(3, 3, 3, 4).transpose(1, 2).flatten(0, 1).flatten(1)
    assert rank(blocks) == 1
    assert step.plan.totals.trainable == 3 * 3 + 2 * (4 + 3)


def test_oft_keeps_norms_and_angles_of_the_neurons() -> None:
    model, step = adapted("oft(block = 4)", 12, 8)
    before, after = model.get_parameter("blocks.0.weight").detach(), step.effective_weight("blocks.0").detach()
    torch.testing.assert_close(after @ after.T, before @ before.T)
    assert float((after - before).abs().max()) > 0.1
    assert step.plan.totals.trainable == 3 * 6


def test_psoft_keeps_the_singular_values_where_nothing_is_scaled() -> None:
    model, step = adapted("psoft(rank = 4)", 12, 8)
    with torch.no_grad():
        for name in ("a", "b"):
            step.parameters_by_site["blocks.0"][name].fill_(1)
    before, after = model.get_parameter("blocks.0.weight").detach(), step.effective_weight("blocks.0").detach()
    torch.testing.assert_close(torch.linalg.svdvals(after), torch.linalg.svdvals(before), rtol=1e-6, atol=1e-7)
    assert float((after - before).abs().max()) > 0.1
    assert step.plan.totals.trainable == 6 + 4 + 4


def test_kasa_drops_the_smallest_singular_values() -> None:
    model, step = adapted("kasa(rank = 3)", 12, 8)
    with torch.no_grad():
        step.parameters_by_site["blocks.0"]["B"].zero_()
    before, after = model.get_parameter("blocks.0.weight").detach(), step.effective_weight("blocks.0").detach()
    expected = torch.linalg.svdvals(before)
    expected[5:] = 0
    torch.testing.assert_close(torch.linalg.svdvals(after), expected, rtol=1e-6, atol=1e-6)


def test_delora_has_a_strength_that_no_factor_changes() -> None:
    model, step = adapted("delora(rank = 4)", 12, 8)
    tensors = step.parameters_by_site["blocks.0"]
    before = change(model, step)
    with torch.no_grad():
        tensors["A"].mul_(7)
        tensors["B"].mul_(-0.1)
    torch.testing.assert_close(change(model, step), -before)
    columns = model.get_parameter("blocks.0.weight").detach().norm(dim=0)
    assert float((before / columns).norm()) <= float(tensors["s"])


def test_sbora_changes_as_many_columns_as_its_rank() -> None:
    model, step = adapted("sbora(rank = 3)", 20, 28)
    assert int((change(model, step).abs().amax(dim=0) > 0).sum()) == 3


# --- what is run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["loha(rank = 3)", "abba(rank = 3)"])
def test_a_hadamard_product_is_never_formed(call: str) -> None:
    _, step = adapted(call, 20, 28, strategy="strategy = branch")
    made = operations(step, 20)
    assert not [name for name, shape in made if shape in ((28, 20), (20, 28))]
    _, folded = adapted(call, 20, 28, strategy="strategy = fold")
    assert [name for name, shape in operations(folded, 20) if shape == (28, 20)]  # what the line above would see


def test_sbora_gathers_and_multiplies_with_b_alone() -> None:
    _, step = adapted("sbora(rank = 3)", 20, 28, strategy="strategy = branch")
    products = [shape for name, shape in operations(step, 20) if "mm" in name]
    assert products == [(5, 28), (5, 28)]  # W and B; none gives [rows, rank]
    _, plain = adapted("lora(rank = 3)", 20, 28, strategy="strategy = branch")
    assert any("low_rank_linear" in name for name, _ in operations(plain, 20))  # which does give [rows, rank]


# --- counts -----------------------------------------------------------------------------------------------------------


def test_lora_xs_and_lora_mini_train_what_does_not_depend_on_the_width() -> None:
    for width in (20, 40):
        _, step = adapted("lora_xs(rank = 4)", width, width)
        assert step.plan.totals.trainable == 4 * 4
        _, step = adapted("lora_mini(rank = 2, outer = 8)", width, width)
        assert step.plan.totals.trainable == 2 * (8 + 8)


def trained(rule: str) -> int:
    """Numbers that a rule trains in BERT-base."""
    model = 'model config "configs/bert_base.json" { task = feature_extraction  dtype = float32 }'
    program = surgery.parse(f"{model}\nadapt {rule}\nstep {{ optimizer = sgd(lr = 1)  batch = 1  steps = 1 }}", SPECS)
    return surgery.plan(program).totals.trainable


def test_lorta_has_one_tensor_for_the_whole_model() -> None:
    d, heads, layers, matrices = 768, 12, 12, 3
    found = trained("encoder.layer.*.attention.self.{query,key,value} { with lorta(rank = 8) }")
    assert found == 8 * (d + d // heads + heads + layers + matrices)


def test_condlora_trains_lora_divided_by_the_number_of_layers() -> None:
    where = "encoder.layer.*.attention.self.{query,value}"
    plain = trained(f"{where} {{ with lora(rank = 8) }}")
    assert trained(f"{where} {{ with condlora(rank = 8) }}") * 12 == plain == 24 * 8 * (768 + 768)


def test_vera_trains_two_vectors_per_site_and_keeps_one_pair_once(tmp_path: Path) -> None:
    _, step = adapted("vera(rank = 6)", 20, 28, 20)
    assert step.plan.totals.trainable == (6 + 28) + (6 + 20)
    step.save(tmp_path / "run")
    saved = {
        name: tensor for file in (tmp_path / "run").rglob("*.safetensors") for name, tensor in load_file(file).items()
    }
    shapes = [tuple(tensor.shape) for tensor in saved.values()]
    assert shapes.count((6, 28)) == shapes.count((28, 6)) == 1  # A of the larger in, B of the larger out
