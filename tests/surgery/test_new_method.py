"""A method that is not in the library is a few lines of a spec: compiled, trained and merged without Python for it."""

import pytest
import torch
from torch import Tensor, nn

import surgery

SPEC = """
# Two low-rank factors around a trained core, and a trained scale for every row.
method scaled_core(rank: int = 4, alpha: real = 2 * rank) {
    A = frozen orthogonal[rank, in]
    R = train normal(0.1)[rank, rank]
    B = train kaiming_uniform[out, rank]
    s = train zeros[out] { weight_decay = 0 }
    scale = alpha / rank
    delta = scale * diag(s) @ B @ R @ A
    after step when step >= 3 { R += -0.1 * R }
}

adapt layers.* : Linear { with scaled_core(rank = 2)  expect 2 }
train head

step { optimizer = adamw(lr = 3e-2, weight_decay = 0.01)  batch = 16  steps = 30  loss = cross_entropy  seed = 1 }
"""


class Network(nn.Module):
    """Two hidden layers of 12 units and a head of 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12)])
        self.head = nn.Linear(12, 4)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[batch, 4]` from features `[batch, 6]`."""
        for layer in self.layers:
            features = torch.relu(layer(features))
        logits: Tensor = self.head(features)
        return logits


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(16, 6, generator=generator)
    return {"features": features, "labels": (features[:, 0] > 0).long() + 2 * (features[:, 1] > 0).long()}


def test_a_new_method_is_planned_trained_and_merged(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Network()
    program = surgery.parse(SPEC)
    plan = surgery.plan(program, model=model)
    assert [site.path for site in plan.sites] == ["layers.0", "layers.1"]
    assert plan.totals.trainable == sum(2 * 2 + out * 2 + out for out in (12, 12)) + (12 * 4 + 4)
    for site in plan.sites:
        assert site.facts.identity_at_start and site.facts.rank_bound == 2 and site.facts.merges
        assert not site.facts.moves_base
    step = surgery.compile(program, model=model, example_inputs={"features": batch["features"]})
    with torch.no_grad():
        torch.testing.assert_close(step.forward(features=batch["features"]), model(batch["features"]))
    losses = [float(step(batch).loss) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        merged = step.merge()
        torch.testing.assert_close(merged(batch["features"]), step.forward(features=batch["features"]))
        change = step.effective_weight("layers.1") - model.get_parameter("layers.1.weight")
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2


def test_the_event_runs_after_the_optimizer(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model, example = Network(), {"features": batch["features"]}
    with_event = surgery.compile(surgery.parse(SPEC), model=model, example_inputs=example)
    text = "\n".join(line for line in SPEC.splitlines() if "after step" not in line)
    without = surgery.compile(surgery.parse(text), model=model, example_inputs=example)
    for _ in range(3):
        with_event(batch)
        without(batch)
    for path in ("layers.0", "layers.1"):
        assert torch.equal(with_event.parameters_by_site[path]["R"], without.parameters_by_site[path]["R"])
    with_event(batch)
    without(batch)
    for path in ("layers.0", "layers.1"):
        expected = without.parameters_by_site[path]["R"].detach() * 0.9
        torch.testing.assert_close(with_event.parameters_by_site[path]["R"].detach(), expected)


def test_a_mistake_in_it_is_underlined() -> None:
    with pytest.raises(surgery.SurgError) as raised:
        surgery.parse(SPEC.replace("diag(s) @ B @ R @ A", "diag(s) @ A @ R @ B"))
    (diagnostic,) = raised.value.diagnostics
    assert diagnostic.code == "SURG005"
    assert diagnostic.span is not None and diagnostic.span.text == "@"
