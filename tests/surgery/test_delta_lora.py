"""Delta-LoRA against a loop written from its algorithm (Zi et al. 2023, arXiv:2309.02411, algorithm 1), in float64.

    delta^t = (alpha / rank) B^t A^t;  the site multiplies with W^t + delta^t;  gradients go to A and B only
    after the optimizer's step t, if t > start:  W^{t+1} = W^t + ratio (delta^{t+1} - delta^t)

Weight decay is decoupled and never touches W. Both readings of the compiler, in place and telescoped, have to agree
with it; SGD with clipping is here because AdamW hides a gradient that is too large by a factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import surgery
from surgery.cli.plan_table import print_plan
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.narrow import narrow
from surgery.compiler.algebra.quantity import Quantity

pytestmark = pytest.mark.usefixtures("captured_once")

STEPS, START, RATIO, RANK, ALPHA = 40, 5, 2.0, 3, 6
SCALE = ALPHA / RANK
TOLERANCE = 1e-10
CLIP = 0.02  # small enough to act in every step

OPTIMIZERS = {
    "adamw": ("adamw(lr = 1e-2, betas = [0.8, 0.95], weight_decay = 0.1)", None),
    "sgd clipped": ("sgd(lr = 0.5, momentum = 0.9)", CLIP),
}


class Reference:
    """The algorithm on any model: W is replaced in a functional call, everything else is written out."""

    def __init__(self, model: nn.Module, factors: dict[str, dict[str, Tensor]], optimizer: str) -> None:
        self.model, self.optimizer = model, optimizer
        self.base = {path: model.get_parameter(f"{path}.weight").detach().clone() for path in factors}
        self.factors = {
            (path, name): tensors[name].detach().clone().requires_grad_()
            for path, tensors in factors.items()
            for name in ("A", "B")
        }
        self.first = {key: torch.zeros_like(value) for key, value in self.factors.items()}
        self.second = {key: torch.zeros_like(value) for key, value in self.factors.items()}
        self.done = 0

    def delta(self, path: str) -> Tensor:
        """`(alpha / rank) B A` of a site."""
        return SCALE * self.factors[path, "B"] @ self.factors[path, "A"]

    def effective(self, path: str) -> Tensor:
        """What the site multiplies with."""
        return self.base[path] + self.delta(path)

    def loss(self, batch: dict[str, Tensor], causal: bool) -> Tensor:
        """Mean over all label tokens of the batch."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        weights = {f"{path}.weight": self.effective(path) for path in self.base}
        logits = functional_call(self.model, weights, (), inputs).logits
        labels = batch["labels"]
        if causal:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, labels)

    def step(self, batch: dict[str, Tensor], causal: bool) -> float:
        """One step of the algorithm; returns the loss before it."""
        loss = self.loss(batch, causal)
        gradients = dict(zip(self.factors, torch.autograd.grad(loss, list(self.factors.values())), strict=True))
        before = {path: self.delta(path).detach() for path in self.base}
        with torch.no_grad():
            for key, change in self.changes(gradients):
                self.factors[key] += change
            if self.done > START:
                for path in self.base:
                    self.base[path] += RATIO * (self.delta(path) - before[path])
        self.done += 1
        return float(loss.detach())

    def changes(self, gradients: dict[tuple[str, str], Tensor]) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """AdamW, or SGD with momentum behind a clip of the whole gradient's norm."""
        count = self.done + 1
        if self.optimizer == "adamw":
            for key, gradient in gradients.items():
                self.first[key] = 0.8 * self.first[key] + 0.2 * gradient
                self.second[key] = 0.95 * self.second[key] + 0.05 * gradient**2
                mean, square = self.first[key] / (1 - 0.8**count), self.second[key] / (1 - 0.95**count)
                yield key, -1e-2 * (0.1 * self.factors[key] + mean / (square.sqrt() + 1e-8))
            return
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        factor = torch.clamp(CLIP / (norm + 1e-6), max=1.0)  # torch's definition, with its 1e-6
        assert factor < 1
        for key, gradient in gradients.items():
            self.first[key] = 0.9 * self.first[key] + factor * gradient
            yield key, -0.5 * self.first[key]


def llama() -> tuple[nn.Module, str, bool]:
    """A causal model of two layers, its pattern, and that it is causal."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=48,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.double(), "model.layers.*.{self_attn,mlp}.*_proj", True


def bert() -> tuple[nn.Module, str, bool]:
    """A classifier of two layers, its pattern, and that it is not causal."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=48,
        max_position_embeddings=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model.double(), "bert.encoder.layer.*.attention.self.{query,value}", False


MODELS = {"llama": llama, "bert": bert}


def batches(causal: bool) -> list[dict[str, Tensor]]:
    """One batch per step; rows of a causal batch have unequal numbers of label tokens."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(STEPS):
        ids = torch.randint(1, 48, (4, 9), generator=generator)
        if causal:
            labels = ids.clone()
            labels[0, :5] = -100
            labels[3, :2] = -100
            made.append({"input_ids": ids, "labels": labels})
        else:
            labels = torch.randint(0, 3, (4,), generator=generator)
            made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def compiled(model: nn.Module, pattern: str, causal: bool, optimizer: str, update: str, micro_batch: int = 4) -> Any:
    """The compiler's step for the same problem."""
    text, clip = OPTIMIZERS[optimizer]
    spec = f"""
        adapt {pattern} {{
            with delta_lora(rank = {RANK}, alpha = {ALPHA}, ratio = {RATIO}, start = {START})
            update = {update}
        }}
        step {{
            optimizer = {text}  schedule = constant  batch = 4  micro_batch = {micro_batch}  steps = {STEPS}
            loss = {"causal_lm" if causal else "cross_entropy"}  compile = off
            {f"clip = {clip}" if clip else ""}
        }}
    """
    example = {key: value for key, value in batches(causal)[0].items() if key != "labels"}
    return surgery.compile(surgery.parse(spec), model=model, example_inputs=example)


def compare(step: Any, reference: Reference, causal: bool) -> None:
    """Forty steps side by side: losses as they go, effective weights at the end."""
    moved = {path: weight.clone() for path, weight in reference.base.items()}
    for number, batch in enumerate(batches(causal)):
        expected = reference.step(batch, causal)
        assert float(step(batch).loss) == pytest.approx(expected, abs=TOLERANCE), f"loss of step {number}"
    for path in reference.base:
        with torch.no_grad():
            assert float((effective(step, path) - reference.effective(path)).abs().max()) <= TOLERANCE, path
            assert (reference.base[path] - moved[path]).norm() > 1e-3  # the algorithm did move W


def effective(step: Any, path: str) -> Tensor:
    """The step's weight in float64: the public one is float32, so it is read off the site's merged module."""
    weight: Tensor = step.merge().get_parameter(f"{path}.weight").detach()
    torch.testing.assert_close(step.effective_weight(path), weight, atol=1e-10, rtol=1e-10)
    return weight


@pytest.mark.parametrize("update", ["literal", "telescope"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_forty_steps_equal_the_algorithm(name: str, optimizer: str, update: str) -> None:
    model, pattern, causal = MODELS[name]()
    step = compiled(model, pattern, causal, optimizer, update)
    compare(step, Reference(model, step.parameters_by_site, optimizer.split()[0]), causal)


def test_a_telescoped_site_is_one_product_of_twice_the_rank() -> None:
    model, pattern, causal = llama()
    step = compiled(model, pattern, causal, "adamw", "telescope")
    formula = instance(step.plan, step.plan.sites[0].formula)
    (term,) = formula.terms
    found = narrow(formula.change(term.matrix))
    assert found is not None and not found.rest
    assert [found.left.shape[-1], found.right.shape[-2]] == [Quantity.of(2 * RANK)] * 2


@pytest.mark.parametrize("ratio", [-1.0, -2.0, 0.5])
def test_both_readings_agree_at_any_ratio(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At -1 the whole change is taken back, and the product of the telescope is a longer one."""
    monkeypatch.setitem(globals(), "RATIO", ratio)
    model, pattern, causal = llama()
    literal, telescope = (compiled(model, pattern, causal, "adamw", update) for update in ("literal", "telescope"))
    for site in literal.plan.sites:
        for tensor in site.tensors:
            with torch.no_grad():
                telescope.weights[tensor.key].copy_(literal.weights[tensor.key])
    for batch in batches(causal)[:12]:
        assert float(telescope(batch).loss) == pytest.approx(float(literal(batch).loss), abs=TOLERANCE)


@pytest.mark.parametrize("update", ["literal", "telescope"])
def test_micro_batches_give_the_same_steps(update: str) -> None:
    # The loss of a step is normalised by all its label tokens, not per micro-batch.
    model, pattern, causal = llama()
    step = compiled(model, pattern, causal, "sgd clipped", update, micro_batch=1)
    compare(step, Reference(model, step.parameters_by_site, "sgd"), causal)


def test_the_readings_differ_in_what_they_store() -> None:
    model, pattern, causal = llama()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    literal = compiled(model, pattern, causal, "adamw", "literal")
    telescope = compiled(model, pattern, causal, "adamw", "telescope")
    for batch in batches(causal)[: START + 4]:
        literal(batch)
        telescope(batch)
    for path in literal.parameters_by_site:
        name = f"{path}.weight"
        assert not torch.equal(literal.weights[name], weights[name])
        assert torch.equal(telescope.weights[name], weights[name])
    for name, parameter in model.named_parameters():  # and neither touches the model that was given
        assert torch.equal(parameter, weights[name])


HALF = [torch.bfloat16, torch.float16]


def half(dtype: torch.dtype) -> tuple[Any, nn.Module, bool]:
    """A literal step over a small Llama in half precision, its model, and that it is causal."""
    model, pattern, causal = llama()
    model.to(dtype)
    return compiled(model, pattern, causal, "adamw", "literal"), model, causal


def factors(step: Any, path: str, suffix: str = "") -> Tensor:
    """`(alpha / rank) B A` of a site in float64, of the tensors with this suffix."""
    tensors = step.parameters_by_site[path]
    product: Tensor = tensors[f"B{suffix}"].detach().double() @ tensors[f"A{suffix}"].detach().double()
    return SCALE * product


@pytest.mark.parametrize("dtype", HALF)
def test_in_half_precision_the_literal_weight_is_rounded_once(dtype: torch.dtype) -> None:
    step, model, causal = half(dtype)
    paths = list(step.parameters_by_site)
    added = {path: model.get_parameter(f"{path}.weight").detach().clone() for path in paths}
    for number, batch in enumerate(batches(causal)):
        before = {path: factors(step, path) for path in paths}
        step(batch)
        for path in paths if number > START else ():
            added[path] += (RATIO * (factors(step, path) - before[path])).to(dtype)
    lost = []
    for path in paths:
        start, now = model.get_parameter(f"{path}.weight").detach().double(), step.weights[f"{path}.weight"].double()
        exact = start + RATIO * (factors(step, path) - factors(step, path, "_start"))
        unit = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()  # of the last place
        error = (now - exact).abs() / unit
        assert float(error.max()) < 0.51, "half a unit, and the rounding of float32 before it"
        lost.append(float(((added[path].double() - exact).abs() / unit).mean() / error.mean()))
    assert min(lost) > 1.5, "adding the change of each step loses more, step by step"


@pytest.mark.parametrize("dtype", HALF)
def test_in_half_precision_literal_resumes_and_merges(dtype: torch.dtype, tmp_path: Path) -> None:
    step, model, causal = half(dtype)
    given = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = batches(causal)
    for batch in rows[: START + 4]:
        step(batch)
    step.save(tmp_path / "run")
    resumed = surgery.load(tmp_path / "run", model)
    for batch in rows[START + 4 : START + 10]:
        assert torch.equal(step(batch).loss, resumed(batch).loss)
    merged = resumed.merge()
    for path in step.parameters_by_site:
        name = f"{path}.weight"
        assert torch.equal(step.weights[name], resumed.weights[name])
        assert not torch.equal(step.weights[name], given[name])
        moved = step.weights[name].float() + factors(step, path).float()
        torch.testing.assert_close(merged.get_parameter(name), moved.to(dtype))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, given[name]), "the user's model is what the sum starts from, and never written"


@pytest.mark.parametrize(("dtype", "said"), [(torch.float32, False), (torch.bfloat16, True)])
def test_the_plan_says_what_stays_in_memory(dtype: torch.dtype, said: bool) -> None:
    model, pattern, _ = llama()
    plan = surgery.plan(
        surgery.parse(f"adapt {pattern} {{ with delta_lora(rank = 2)  update = literal }}"), model.to(dtype)
    )
    console = Console(width=400, file=StringIO())
    print_plan(console, plan)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "(literal" in text and ("which stays in memory" in text) == said


def test_in_half_precision_literal_needs_a_closed_form() -> None:
    """What is added step by step is lost there; where the sum has no closed form it is refused."""
    model, pattern, _ = llama()
    text = f"""
        method now_and_then(rank: int = 2) {{
            A = train kaiming_uniform[rank, in];  B = train zeros[out, rank];  delta = B @ A
            after step when step % 2 == 0 {{ W += delta - prev(delta) }}
        }}
        adapt {pattern} {{ with now_and_then()  update = literal }}
    """
    surgery.plan(surgery.parse(text), model.float())
    with pytest.raises(surgery.SurgError) as raised:
        surgery.plan(surgery.parse(text), model.bfloat16())
    assert {diagnostic.code for diagnostic in raised.value.diagnostics} == {"SURG032"}


CORRECTED = """
method moving(rank: int = 2) {
    A = train normal(0.3)[rank, in];  B = train normal(0.3)[out, rank];  delta = B @ A
    at start { W -= delta }
    after step when step > 1 { W += delta - prev(delta) }
}
adapt blocks.*.* { with moving()  update = literal }
step { optimizer = sgd(lr = 0.5)  batch = 5  steps = 8  loss = mse }
"""


def test_the_sum_starts_from_the_corrected_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Blocks(nn.ModuleList([nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})])).bfloat16()
    batch = {"x": torch.randn(5, 6).bfloat16(), "labels": torch.randn(5, 6).bfloat16()}
    step = surgery.compile(surgery.parse(CORRECTED), model=model, example_inputs={"x": batch["x"]})
    starts = {path: step.weights[f"{path}.weight"].clone() for path in step.parameters_by_site}
    for _ in range(4):
        step(batch)
    step.save(tmp_path / "run")
    resumed = surgery.load(tmp_path / "run", model, example_inputs={"x": batch["x"]})
    for each in (step, resumed):
        each(batch)
        for path, start in starts.items():
            tensors = each.parameters_by_site[path]
            now, then = (tensors[f"B{s}"].double() @ tensors[f"A{s}"].double() for s in ("", "_start"))
            exact = start.double() + now - then
            assert not torch.equal(start, model.get_parameter(f"{path}.weight"))
            torch.testing.assert_close(each.weights[f"{path}.weight"].double(), exact, rtol=2**-8, atol=0)


SHARED = """
method shared_delta(rank: int = 2) {{
    A = train kaiming_uniform[rank, in] shared by {how}
    B = train normal(0.1)[out, rank]    shared by {how}
    delta = B @ A
    after step when step > 0 {{ W += 0.5 * (delta - prev(delta)) }}
}}
adapt blocks.*.* {{ with shared_delta()  update = {update} }}
step {{ optimizer = sgd(lr = 0.5)  batch = 5  steps = 4  loss = mse }}
"""


@pytest.mark.parametrize("how", ["model", "layer", "kind"])
def test_both_readings_agree_where_the_factors_are_shared(how: str) -> None:
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}) for _ in range(2)]
    model = Blocks(nn.ModuleList(blocks)).double()
    batch = {"x": torch.randn(5, 6).double(), "labels": torch.randn(5, 6).double()}
    steps = []
    for update in ("literal", "telescope"):
        text = SHARED.format(how=how, update=update)
        step = surgery.compile(surgery.parse(text), model=model, example_inputs={"x": batch["x"]})
        for _ in range(4):
            step(batch)
        steps.append(step)
    for path in steps[0].parameters_by_site:
        literal, telescope = (step.effective_weight(path) for step in steps)
        assert not torch.equal(literal, model.get_parameter(f"{path}.weight"))
        torch.testing.assert_close(literal, telescope, rtol=0, atol=TOLERANCE)


class Blocks(nn.Module):
    """Two linears per block."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["b"](torch.tanh(block["a"](x)))  # type: ignore[index]
        return x
