"""Methods of structured matrices in a step: which form runs, what sites share, and names in step.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery

WIDTH, ROWS = 32, 4096
METHODS = """
method turning() {
    requires in == out
    a = train normal(0.1)[in]
    delta = circ(a)
    after step when step >= 1 { W += 0.1 * (circ(a) - prev(circ(a))) }
}
method doubled() {
    requires in == out
    a = train normal(0.1)[in]
    weight = circ(a) @ (2 * W)
}
"""


class Attention(nn.Module):
    """Three linears that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, WIDTH]` to the same."""
        product: Tensor = torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        return product


class Stack(nn.Module):
    """Two blocks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention() for _ in range(2)])
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, WIDTH]` to the same."""
        for layer in self.layers:
            x = layer(x)
        return x


def step_of(method: str, dtype: torch.dtype, options: str = "") -> Any:
    program = surgery.parse(f"""{METHODS}
        adapt layers.*.{{q,k,v}} {{ with {method}  {options} }}
        step {{ optimizer = adamw(lr = 1e-2)  batch = {ROWS}  steps = 8  loss = mse }}
    """)
    return surgery.compile(program, model=Stack(dtype), example_inputs={"x": batch(dtype)["x"]})


def batch(dtype: torch.dtype, rows: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, labels = (torch.randn(rows, WIDTH, generator=generator).to(dtype) for _ in range(2))
    return {"x": x, "labels": labels}


def by_site(step: Any) -> nn.Module:
    """The model with the weights that the step says it has, in float64."""
    model = copy.deepcopy(Stack(torch.float64))
    with torch.no_grad():
        for site in step.plan.sites:
            model.get_parameter(site.parameter).copy_(step.effective_weight(site.path))
    return model


@pytest.mark.parametrize("method", ["circulant()", "c3a(block = 8)", "toeplitz()", "symmetric_toeplitz()"])
def test_in_half_precision_the_matrix_is_formed(method: str) -> None:
    step = step_of(method, torch.bfloat16, "strategy = branch")
    assert "fft" not in step.source and "added_linear(" in step.source and "from_diagonals(" in step.source
    losses = [float(step(batch(torch.bfloat16)).loss) for _ in range(8)]
    assert losses[-1] < losses[0]
    x = batch(torch.bfloat16)["x"]
    torch.testing.assert_close(step.forward(x=x).double(), by_site(step)(x.double()), rtol=5e-2, atol=5e-2)


def test_sites_that_read_one_input_share_its_transform() -> None:
    step = step_of("circulant()", torch.float32, "strategy = branch")
    block = step.source[step.source.index("def attention(") : step.source.index("def forward(")]
    assert block.count("rfft(hidden") == 1 and block.count("irfft(") == 3
    losses = [float(step(batch(torch.float32)).loss) for _ in range(8)]
    assert losses[-1] < losses[0]
    x = batch(torch.float32)["x"]
    torch.testing.assert_close(step.forward(x=x).double(), by_site(step)(x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "options"), [
    ("turning()", "update = literal"), ("turning()", "strategy = recompute  update = literal"),
    ("circulant()", "strategy = recompute"), ("ldr()", "strategy = fold"), ("doubled()", "strategy = recompute"),
])  # fmt: skip
def test_no_value_of_step_py_hides_what_it_calls(method: str, options: str) -> None:
    step = step_of(method, torch.float32, options)
    losses = [float(step(batch(torch.float32)).loss) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_a_magnitude_is_a_factor_of_columns_over_norms_from_parts() -> None:
    step = step_of("dora(rank = 2)", torch.bfloat16)
    assert step.source.count("scaled_columns(") >= 3 and step.source.count("updated_row_norms(") >= 3
    losses = [float(step(batch(torch.bfloat16)).loss) for _ in range(8)]
    assert losses[-1] < losses[0]
    x = batch(torch.bfloat16)["x"]
    torch.testing.assert_close(step.forward(x=x).double(), by_site(step)(x.double()), rtol=5e-2, atol=5e-2)
