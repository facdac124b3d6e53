"""Methods that are not in the library, from the language page alone: each trains, and merges or says why not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery

METHODS = {
    "a core that all sites share": """
        A = train kaiming_uniform[rank, in]
        C = train eye[rank, rank] shared by model
        B = train zeros[out, rank]
        delta = B @ C @ A
    """,
    "blocks of circulants and a low rank": """
        c = train zeros[out / 4, in / 4, 4]
        A = train kaiming_uniform[rank, in]
        B = train zeros[out, rank]
        delta = grid(circ(c)) + B @ A
    """,
    "a gate of x on an adapter of y": """
        G = train kaiming_uniform[rank, in]
        D = train kaiming_uniform[rank, out]
        U = train zeros[out, rank]
        output = y + (sigmoid(x @ G.T) * gelu(y @ D.T)) @ U.T
    """,
    "a weighted sum of pairs on a leading axis": """
        A = train kaiming_uniform[3, rank, in]
        B = train zeros[3, out, rank]
        s = train ones[3]
        delta = sum(s[i] * (B[i] @ A[i]) for i in 0..2)
    """,
    "the largest entries of W at the start": """
        K = frozen topk_mask(abs(W), 0.1)
        D = train zeros[out, in]
        delta = K * D
    """,
    "drawn entries": """
        places = frozen choice(out * in)[20]
        v = train zeros[20]
        delta = scatter(v, places, out, in)
    """,
    "the first step of the gradient, whose start W gives up": """
        A = train right_singular(grad(W), rank)
        B = train -left_singular(grad(W), rank)
        delta = B @ A
        at start { W -= delta }
    """,
}
MERGES = {name: "gate" not in name for name in METHODS}


class Stack(nn.Module):
    """Two blocks, each a square layer and one that widens, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 32)) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            input = input + block(input)[:, :16]
        return self.head(input)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", METHODS)
def test_an_invented_method_trains_and_merges(name: str) -> None:
    torch.manual_seed(0)
    model = Stack()
    batch = {"input": torch.randn(8, 16), "labels": torch.randint(0, 4, (8,))}
    program = surgery.parse(f"""
        method invented(rank: int = 4) {{ {METHODS[name]} }}
        adapt blocks.** : Linear {{ with invented()  expect 4 }}
        step {{ optimizer = adamw(lr = 1e-2)  loss = cross_entropy  batch = 8  steps = 10 }}
    """)
    inputs = {"input": batch["input"]}
    step = surgery.compile(program, model=model, example_inputs=inputs, calibration=[batch])
    torch.testing.assert_close(step.forward(**inputs), model(**inputs))
    losses = [float(step(batch).loss) for _ in range(10)]
    assert losses[-1] < losses[0]
    if MERGES[name]:
        torch.testing.assert_close(step.merge()(**inputs), step.forward(**inputs))
    else:
        with pytest.raises(surgery.SurgError, match="SURG055"):
            step.merge()
