"""The neighbour methods against peft 0.21: the same tensors give the same outputs and the same gradients.

In float64, so that 1e-10 is left, except where peft itself computes in float32. A gradient is read off one step of
plain SGD, as in test_parity_peft.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.c3a.utils import BlockCircularConvolution
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import surgery

RATE = 1e5
ALL = ["query", "key", "value", "output.dense", "intermediate.dense"]
Part = Callable[[Tensor], Tensor]  # a parameter itself, or its gradient


@dataclass(frozen=True)
class Case:
    """One method on both sides; `layout` gives peft's parameters (or gradients) of a layer as ours, by name."""

    rules: str
    config: Callable[[], peft.PeftConfig]
    layout: Callable[[Any, Part], dict[str, Tensor]]
    tolerance: float = 1e-10
    prepare: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None  # what of peft is replaced


def everywhere(call: str, where: str = "") -> str:
    """One rule for all linears of the encoder."""
    return f"adapt bert.encoder.layer.** : Linear {where} {{ with {call} }}"


def by_name(**names: str) -> Callable[[Any, Part], dict[str, Tensor]]:
    """The layout where peft's tensors have our shapes: our name = its name."""
    return lambda layer, part: {ours: part(getattr(layer, theirs)["default"]) for ours, theirs in names.items()}


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
        "A": a.unflatten(2, (k, -1)).permute(2, 0, 3, 1),
        "B": b.unflatten(1, (k, -1)).permute(0, 1, 3, 2),
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
        prepare=differentiated,
    ),
    # its spectrum is always float32
    "fourierft": Case(
        everywhere("fourierft(frequencies = 50, alpha = 20)"),
        lambda: peft.FourierFTConfig(n_frequency=50, scaling=20.0, target_modules=ALL),
        fourierft,
        1e-5,
    ),
    # where a site has more inputs than outputs peft transposes the whole sum; ours scales the inputs there too
    "randlora": Case(
        everywhere("randlora(rank = 5, alpha = 7)", "where in <= out"),
        lambda: peft.RandLoraConfig(
            r=5, randlora_alpha=7, target_modules=r".*(query|key|value|attention\.output\.dense|intermediate\.dense)"
        ),
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
        everywhere("kasa(rank = 4, alpha = 6)"),
        lambda: peft.LoraConfig(r=4, lora_alpha=6, kasa_config=peft.KasaConfig(), target_modules=ALL),
        kasa,
        1e-5,
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


def build() -> nn.Module:
    """A small BERT whose sizes all blocks divide, drawn in float32 and widened to float64."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
        initializer_range=0.1,
    )  # fmt: skip
    model: nn.Module = BertForSequenceClassification(config)
    return model.double()


def batch() -> dict[str, Tensor]:
    """Four rows of 12 tokens, the last one padded."""
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[3, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])}


def sides(case: Case) -> tuple[Any, Any, dict[str, Any]]:
    """Our step and peft's model with equal tensors, none of them at its start; peft's layers by path."""
    model = build()
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    wrapped = peft.get_peft_model(copy.deepcopy(model).float(), case.config()).double()  # loses nothing: see `build`
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    settings = f"optimizer = sgd(lr = {RATE})  batch = 4  steps = 1  loss = cross_entropy  compile = off"
    program = surgery.parse(f"{case.rules} step {{ {settings} }}")
    step = surgery.compile(program, model=model, example_inputs=inputs)
    layers = {path: wrapped.base_model.model.get_submodule(path) for path in step.parameters_by_site}
    with torch.no_grad():
        for path, layer in layers.items():
            for name, value in case.layout(layer, lambda tensor: tensor.detach()).items():
                ours = tensor_of(step, path, name)
                assert ours.shape == value.shape, f"{path}.{name}"
                ours.copy_(value)
    return step, wrapped, layers


def tensor_of(step: Any, path: str, name: str) -> Tensor:
    """A tensor of the site's method, or a parameter of its module that is trained as it is."""
    found: Tensor = step.parameters_by_site[path].get(name, step.weights.get(f"{path}.{name}"))
    return found


def close(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    """Equal to `tolerance` of the largest entry."""
    error = float((ours - theirs).abs().max())
    assert error <= tolerance * float(theirs.abs().max()), f"{what}: off by {error}"


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_peft(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, example = CASES[name], batch()
    case.prepare(monkeypatch)
    inputs = {key: value for key, value in example.items() if key != "labels"}
    step, wrapped, layers = sides(case)
    with torch.no_grad():
        theirs = wrapped.eval()(**inputs).logits
        assert not torch.allclose(theirs, build().eval()(**inputs).logits)
        close(step.forward(**inputs).logits, theirs, case.tolerance, "logits")
        close(step.merge().eval()(**inputs).logits, theirs, case.tolerance, "logits after merging")

    trained = {(site.path, t.name) for site in step.plan.sites for t in site.tensors if t.role == "train"}
    trained |= {tuple(entry.name.rsplit(".", 1)) for entry in step.plan.trained}
    before = {key: tensor_of(step, *key).detach().clone() for key in trained}
    F.cross_entropy(wrapped(**inputs).logits, example["labels"]).backward()  # type: ignore[no-untyped-call]
    step(example)
    counted = 0
    for path, layer in layers.items():
        for tensor, gradient in case.layout(layer, gradient_of).items():
            if (path, tensor) not in trained:
                continue
            moved = (before[path, tensor] - tensor_of(step, path, tensor).detach()) / RATE
            close(moved, gradient, case.tolerance, f"gradient of {path}.{tensor}")
            counted += 1
    assert counted == len(trained)


def gradient_of(parameter: Tensor) -> Tensor:
    """The gradient, zero where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


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
