"""LoKO, a Kalman filter with a variance per number: against the dense filter, and recursive least squares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers import AutoConfig, AutoModelForSequenceClassification

import surgery
from surgery.compiler.memory import predicted
from surgery.optimizers.loko import Loko
from surgery.runtime.run_folder import load_state
from tests.surgery.optimizers import SITES, Network, batch, put, step_of

ROOT = Path(__file__).resolve().parents[2]


class Diagonal(nn.Module):
    """One weight `[4, 4]`, without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(4, 4, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, 4]`."""
        return self.only(x)  # type: ignore[no-any-return]


def rows(number: int, count: int = 3) -> dict[str, Tensor]:
    """Rows of four numbers and their targets."""
    draw = torch.Generator().manual_seed(number)
    x, labels = (torch.randn(count, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    return {"x": x, "labels": labels}


def test_a_linear_model_is_recursive_least_squares() -> None:
    method = "method scaled() { requires in == out\n a = train zeros[in]\n weight = diag(a) }\n"
    optimizer = "step { optimizer = loko(variance = 0.5, noise = 0.7, beta = 1)  loss = mse  compile = off }"
    program = surgery.parse(method + "adapt only { with scaled() }\n" + optimizer)
    step: Any = surgery.compile(program, Diagonal(), {"x": rows(0)["x"]})
    inputs, targets = [], []
    for number in range(12):
        step(rows(number))
        inputs.append(rows(number)["x"])
        targets.append(rows(number)["labels"])
        x, y = torch.cat(inputs), torch.cat(targets)  # output j is a[j] * x[j]: a ridge regression for each
        precision = 1 / 0.5 + x.square().sum(0) / 0.7
        a = step.parameters_by_site["only"]["a"].detach()
        torch.testing.assert_close(a, (x * y).sum(0) / 0.7 / precision, rtol=1e-12, atol=1e-14)
        (variance,) = step.optimizer.variance
        torch.testing.assert_close(variance, 1 / precision, rtol=1e-11, atol=1e-14)


def test_steps_are_those_of_the_dense_filter() -> None:
    step = step_of("loko(variance = 0.02, noise = 0.3, beta = 0.8)", settings="micro_batch = 3")
    put(step)
    model, names = Network(), list(step.optimizer.names)
    shapes = [step.weights[name].shape for name in names]
    variance = torch.full((sum(shape.numel() for shape in shapes),), 0.02, dtype=torch.float64)
    noise = 0.3 * torch.eye(6, dtype=torch.float64)

    def outputs(theta: Tensor, x: Tensor) -> Tensor:
        parts = torch.split(theta, [shape.numel() for shape in shapes])
        new = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        weights: dict[str, Tensor] = dict(model.named_parameters())
        for site in SITES:
            weights[f"{site}.weight"] = weights[f"{site}.weight"] + 2 * new[f"{site}.B"] @ new[f"{site}.A"]
        return functional_call(model, weights, (x,))  # type: ignore[no-any-return]

    for number in range(3):
        data = {name: tensor[:5] for name, tensor in batch(seed=number).items()}
        theta = torch.cat([step.weights[name].detach().flatten() for name in names])
        jacobian = jacrev(outputs)(theta, data["x"]).detach().flatten(0, 1)  # [5 * 6, numbers]
        residual = (data["labels"] - outputs(theta, data["x"])).detach()
        spread = jacobian @ torch.diag(variance) @ jacobian.T
        of_rows = [slice(6 * row, 6 * row + 6) for row in range(5)]
        misses = [residual[row].outer(residual[row]) + spread[of, of] for row, of in enumerate(of_rows)]
        noise = 0.8 * noise + 0.2 * torch.stack(misses).mean(0)
        gain = torch.diag(variance) @ jacobian.T @ torch.linalg.inv(spread + torch.kron(torch.eye(5), noise))
        theta = theta + gain @ residual.flatten()
        after = ((torch.eye(len(theta)) - gain @ jacobian) @ torch.diag(variance)).diagonal()
        assert (after > 0).all() and (after <= variance).all()
        variance = after
        step(data)
        found = torch.cat([step.weights[name].detach().flatten() for name in names])
        torch.testing.assert_close(found, theta, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(torch.cat([one.flatten() for one in step.optimizer.variance]), variance)


def filter_of(noise: float) -> tuple[nn.Parameter, Tensor, Tensor, Loko]:
    """A linear model of one output, one observation, and a filter."""
    theta = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))
    x, y = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64), torch.tensor([[2.0]], dtype=torch.float64)
    return theta, x, y, Loko([{"params": [theta], "lr": 1.0}], ["theta"], variance=1.0, noise=noise, beta=1.0)


def test_without_noise_one_observation_is_met_and_with_all_noise_nothing_moves() -> None:
    for noise, moved in ((1e-14, 1.0), (1e14, 0.0)):
        theta, x, y, optimizer = filter_of(noise)
        start = theta.detach() @ x
        optimizer.observe((theta @ x).reshape(1, 1), y, torch.tensor([True]))
        optimizer.step()
        torch.testing.assert_close(theta.detach() @ x, start + moved * (y[0, 0] - start), rtol=0, atol=1e-10)


def classifier(dtype: str = "float32", settings: str = "") -> Any:
    """A tiny encoder with four classes."""
    program = surgery.parse(
        f"""adapt bert.encoder.layer.*.attention.self.{{query,value}} {{ with lora(rank = 2) }}
        train classifier
        step {{
            optimizer = loko(variance = 0.05, noise = 0.1)
            batch = 2  compile = off  adapter_dtype = {dtype} {settings}
        }}"""
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    config = AutoConfig.for_model("bert", **sizes, **dropouts, num_labels=4, vocab_size=16, max_position_embeddings=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
    return surgery.compile(program, model)


def texts(number: int) -> dict[str, Tensor]:
    """Two rows of tokens, each the name of its class."""
    labels = torch.randint(0, 4, (2,), generator=torch.Generator().manual_seed(number))
    tokens = (labels.unsqueeze(-1) + 5).expand(2, 6).contiguous()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def test_it_learns_classes() -> None:
    step = classifier()
    first = sum(float(step(texts(number)).loss) for number in range(5))
    for number in range(5, 30):
        step(texts(number))
    assert sum(float(step.evaluate_loss(texts(number))[0]) / 2 for number in range(5)) < 0.3 * first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_to_the_bit(dtype: str, tmp_path: Path) -> None:
    unbroken = classifier(dtype)
    for number in range(6):
        if number == 3:
            unbroken.save(tmp_path)
        unbroken(texts(number))
    resumed = classifier(dtype)
    resumed.load_state_dict(load_state(tmp_path).state)
    for number in range(3, 6):
        resumed(texts(number))
    for key, value in unbroken.state_dict()["weights"].items():
        assert torch.equal(value, resumed.state_dict()["weights"][key]), key
    saved = unbroken.optimizer.state_dict()["variance"]
    assert set(saved) == set(unbroken.optimizer.names)
    assert all(value.dtype == torch.float32 for value in saved.values())


def test_a_language_model_is_asked_for_its_label_tokens_alone() -> None:
    spec = f"""model config "{ROOT}/specs/configs/tiny_llama.json" {{ task = causal_lm }}
        adapt model.layers.*.self_attn.q_proj {{ with lora(rank = 2) }}
        step {{ optimizer = loko(variance = 0.1, noise = 0.1, tokens = [7, 9])  batch = 2  compile = off }}"""
    step: Any = surgery.compile(surgery.parse(spec))
    ids = torch.tensor([[3, 4, 5, 7], [3, 4, 6, 9]])
    labels = torch.where(torch.arange(4) == 3, ids, -100)  # of each row its answer
    data = {"input_ids": ids, "labels": labels}

    def margin() -> Tensor:
        logits = step.forward(input_ids=ids).logits[:, 2]
        return torch.stack([logits[0, 7] - logits[0, 9], logits[1, 9] - logits[1, 7]])

    before = margin()
    for _ in range(5):
        step(data)
    assert (margin().sum() > before.sum()).item()
    assert step.optimizer.noise.shape == (2, 2)
    unmoved = {name: value.clone() for name, value in step.state_dict()["weights"].items()}
    noise = step.optimizer.noise.clone()
    step({"input_ids": ids, "labels": torch.where(labels == -100, labels, 11)})  # none of the tokens
    assert all(torch.equal(value, unmoved[name]) for name, value in step.state_dict()["weights"].items())
    assert torch.equal(step.optimizer.noise, noise)


def test_what_is_compiled_may_be_gone_through_backwards_again() -> None:
    eager, compiled = classifier(), classifier(settings="precision = model")
    compiled.use_source(eager.source)
    compiled._namespace["compile_forward"]()
    for number in range(3):
        losses = [float(step(texts(number)).loss) for step in (eager, compiled)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_plan_takes_its_memory() -> None:
    assert predicted(classifier(), 6, "cpu").optimizer > 0
