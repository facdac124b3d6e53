"""The neighbour methods against peft 0.21: the same tensors give the same outputs and the same gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.c3a.utils import BlockCircularConvolution
from torch import Tensor

from tests.surgery.peft_parity import Case, Part, by_name, compare

pytestmark = pytest.mark.usefixtures("captured_once")

ALL = ["query", "key", "value", "output.dense", "intermediate.dense"]


def everywhere(call: str, where: str = "") -> str:
    """One rule for all linears of the encoder."""
    return f"adapt bert.encoder.layer.** : Linear {where} {{ with {call} }}"


def loha(layer: Any, part: Part) -> dict[str, Tensor]:
    names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    return by_name(**names)(layer, part)


def oft(layer: Any, part: Part) -> dict[str, Tensor]:
    return {"q": part(layer.oft_R["default"].weight)}


def fourierft(layer: Any, part: Part) -> dict[str, Tensor]:
    rows, columns = layer.indices["default"]  # ours are counted row by row
    return {"c": part(layer.fourierft_spectrum["default"]), "E": rows * layer.in_features + columns}


def randlora(layer: Any, part: Part) -> dict[str, Tensor]:
    # peft multiplies B flattened as (term, rank) with A flattened as (rank, term): as B is random, any order is one
    return {
        "A": part(layer.randlora_A["default"])[:, 0],
        "B": part(layer.randlora_B["default"]).flatten(1),
        "l": part(layer.randlora_lambda["default"]).flatten(),
        "g": part(layer.randlora_gamma["default"]),
    }


def gralora(layer: Any, part: Part) -> dict[str, Tensor]:
    # A is [column, in / k, (row, s)] and B is [row, (column, s), out / k]; ours are [row, column, ...]
    a, b = part(layer.gralora_A["default"]), part(layer.gralora_B["default"])
    k = len(a)
    return {
        "A": a.reshape(*a.shape[:2], k, -1).permute(2, 0, 3, 1),
        "B": b.reshape(k, k, -1, b.shape[2]).permute(0, 1, 3, 2),
    }


def kasa(layer: Any, part: Part) -> dict[str, Tensor]:
    factors = {"A": part(layer.lora_A["default"].weight), "B": part(layer.lora_B["default"].weight)}
    return {**factors, "d": part(layer.lora_diag["default"])}


def psoft(layer: Any, part: Part) -> dict[str, Tensor]:
    # peft divides B by the scale that it multiplies with later: they cancel, so ours has none
    a, b = layer._get_psoft_ab_cache_buffers("default")
    turn = layer.psoft_R["default"]
    trained = {"q": part(turn.weight), "a": part(turn.vector_a), "b": part(turn.vector_b)}
    return {**trained, "A": part(a), "B": part(b) * layer.scaling["default"]}


def circular(x: Tensor, kernel: Tensor) -> Tensor:
    """peft's forward of C3A, for autograd to differentiate."""
    forgetful = SimpleNamespace(save_for_backward=lambda *tensors: None)
    found: Tensor = BlockCircularConvolution.forward(forgetful, x, kernel)
    return found


def differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's C3A in float64, with the gradient of its forward: see the test of its own backward below."""
    monkeypatch.setattr("peft.tuners.c3a.layer.BlockCircularConvolution", SimpleNamespace(apply=circular))
    monkeypatch.setattr("peft.tuners.c3a.layer.torch", SimpleNamespace(**{**vars(torch), "float32": torch.float64}))


def ln_tuning(layer: Any, part: Part) -> dict[str, Tensor]:
    norm = layer.ln_tuning_layers["default"]
    return {"g": part(norm.weight) - part(layer.base_layer.weight), "bias": part(norm.bias)}


CASES = {
    "vera": Case(
        everywhere("vera(rank = 6)"),
        lambda: peft.VeraConfig(r=6, target_modules=ALL),
        by_name(A="vera_A", B="vera_B", d="vera_lambda_d", b="vera_lambda_b"),
    ),
    "lokr": Case(
        everywhere("lokr(rank = 2, alpha = 3, factor = 4)"),
        lambda: peft.LoKrConfig(r=2, alpha=3, decompose_factor=4, target_modules=ALL),
        by_name(C="lokr_w1", A="lokr_w2_b", B="lokr_w2_a"),
    ),
    "loha": Case(
        everywhere("loha(rank = 4, alpha = 6)"), lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=ALL), loha
    ),
    # peft's default is a Neumann series of five terms, which is a rotation only nearly; ours is exact
    "oft": Case(
        everywhere("oft(block = 8)"),
        lambda: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=ALL),
        oft,
    ),
    "c3a": Case(
        everywhere("c3a(block = 8)"),
        lambda: peft.C3AConfig(block_size=8, target_modules=ALL),
        by_name(w="c3a_kernel"),
    ),
    # its spectrum is always float32
    "fourierft": Case(
        everywhere("fourierft(frequencies = 50, alpha = 20)"),
        lambda: peft.FourierFTConfig(n_frequency=50, scaling=20.0, target_modules=ALL),
        fourierft,
        1e-5,
    ),
    "randlora": Case(
        everywhere("randlora(rank = 5, alpha = 7)", "where in <= out")
        + everywhere("randlora_wide(rank = 5, alpha = 7)", "where in > out"),
        lambda: peft.RandLoraConfig(r=5, randlora_alpha=7, target_modules=ALL),
        randlora,
    ),
    "miss": Case(
        everywhere("miss(rank = 6)"),
        lambda: peft.MissConfig(r=6, target_modules=ALL),
        lambda layer, part: {"D": part(layer.miss_block["default"]).T},
    ),
    "hira": Case(
        everywhere("hira(rank = 4)"),
        lambda: peft.HiraConfig(r=4, target_modules=ALL),
        by_name(A="hira_A", B="hira_B"),
    ),
    "gralora": Case(
        everywhere("gralora(rank = 8, k = 4, alpha = 12)"),
        lambda: peft.GraloraConfig(r=8, gralora_k=4, alpha=12, target_modules=ALL),
        gralora,
    ),
    # its decomposition of W is in float32
    "kasa": Case(
        everywhere("kasa(rank = 4, alpha = 6, beta = 0, gamma = 0)"),
        lambda: peft.LoraConfig(r=4, lora_alpha=6, kasa_config=peft.KasaConfig(), target_modules=ALL),
        kasa,
        1e-5,
    ),
    "delora": Case(
        everywhere("delora(rank = 4, strength = 3)"),
        lambda: peft.DeloraConfig(r=4, delora_lambda=3, target_modules=ALL),
        by_name(A="delora_A", B="delora_B", s="delora_lambda", w="delora_w_norm"),
    ),
    "psoft": Case(
        everywhere("psoft(rank = 5)"), lambda: peft.PsoftConfig(r=5, psoft_alpha=9, target_modules=ALL), psoft
    ),
    "ia3": Case(
        """adapt bert.encoder.layer.*.attention.self.{key, value} { with ia3() }
           adapt bert.encoder.layer.*.output.dense { with ia3_input() }""",
        lambda: peft.IA3Config(
            target_modules=r".*(key|value|\d\.output\.dense)", feedforward_modules=r".*\d\.output\.dense"
        ),
        lambda layer, part: {"l": part(layer.ia3_l["default"]).flatten()},
    ),
    # called BEFT there; the bias of a key never moves, as softmax does not see it
    "bitfit": Case(
        "adapt bert.encoder.layer.*.attention.self.{query, value} { with bitfit() }",
        lambda: peft.BeftConfig(target_modules=["query", "value"]),
        lambda layer, part: {"b": part(layer.beft_bias["default"])[0]},
    ),
    "ln_tuning": Case(
        """adapt bert.encoder.layer.**.LayerNorm { with ln_tuning() }
           train bert.encoder.layer.**.LayerNorm.bias""",
        lambda: peft.LNTuningConfig(target_modules=r".*layer.*LayerNorm"),
        ln_tuning,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_peft(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "c3a":
        differentiated(monkeypatch)
    compare(CASES[name])


def test_pefts_c3a_passes_a_wrong_gradient_to_its_input() -> None:
    """Of the kernel it is right; of the input the kernel is read the wrong way round, so layers below learn wrongly."""
    generator = torch.Generator().manual_seed(0)
    x, kernel, out = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 16), (4, 2, 8), (3, 32))
    )
    x.requires_grad_(), kernel.requires_grad_()
    own = torch.autograd.grad(BlockCircularConvolution.apply(x, kernel), (x, kernel), out)
    true = torch.autograd.grad(circular(x, kernel), (x, kernel), out)
    torch.testing.assert_close(own[1], true[1])
    assert not torch.allclose(own[0], true[0], rtol=0.1)
