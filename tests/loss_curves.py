"""Training of a small decoder in two ways: what surgery makes of a spec, and plain torch with the papers' formulas.

The plain way forms every adapted weight in float32 by a function of `tests/surgery/references`, and takes torch's own
AdamW: it shares no code with what it is compared to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from tests.surgery.references import low_rank, sparse, structured

STEPS, RATE = 200, 3e-3
Formula = Callable[[Tensor, dict[str, Any], dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Case:
    """A method at its numbers, its formula, the sites, and how much W moves with each change of the update."""

    call: str
    formula: Formula
    numbers: dict[str, Any]
    sites: str = "model.layers.*.{self_attn,mlp}.*_proj"
    sparse: bool = False
    ratio: float = 0.0


CASES = {
    "lora": Case("lora(rank = 4, alpha = 8)", low_rank.lora, {"rank": 4, "alpha": 8.0}),
    "dora": Case("dora(rank = 4, alpha = 8)", low_rank.dora, {"rank": 4, "alpha": 8.0}),
    "lors": Case(
        "lors(rank = 4, alpha = 4)", sparse.lors, {"rank": 4, "alpha": 4.0, "exact": False}, sparse=True
    ),
    "circulant": Case("circulant()", structured.circulant, {}, "model.layers.*.self_attn.{q,o}_proj"),
    "delta_lora": Case(
        "delta_lora(rank = 4, alpha = 8, ratio = 0.5, start = 0)", low_rank.delta_lora, {"rank": 4, "alpha": 8.0},
        ratio=0.5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The decoder and its rows."""

    hidden: int = 48
    vocabulary: int = 67
    rows: int = 4
    length: int = 16
    device: str = "cpu"

    def model(self, zeros: bool) -> Any:
        """Two layers in float32; with `zeros` half of each linear's weight is zero."""
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=self.hidden, intermediate_size=2 * self.hidden, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=self.vocabulary, max_position_embeddings=self.length,
        ))  # fmt: skip
        with torch.no_grad():
            for name, weight in model.named_parameters() if zeros else ():
                if name.endswith("_proj.weight"):
                    weight.mul_(torch.rand_like(weight) < 0.5)
        return model.requires_grad_(False)

    def batches(self) -> Iterator[Tensor]:
        """Tokens [rows, length] of eight batches in turns, which can be learnt by heart."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, self.vocabulary, (8, self.rows, self.length), generator=generator)
        for number in range(STEPS):
            yield tokens[number % 8].to(self.device)


def compiled(case: Case, shape: Shape, rule: str = "", settings: str = "compile = off", dtype: Any = None) -> Any:
    """The step that surgery makes; the model in `dtype`."""
    model = shape.model(case.sparse).to(device=shape.device, dtype=dtype or torch.float32)
    program = surgery.parse(f"""
        adapt {case.sites} {{ with {case.call}  {rule} }}
        step {{ optimizer = adamw(lr = {RATE})  batch = {shape.rows}  steps = {STEPS}  loss = causal_lm  {settings} }}
    """)
    tokens = next(shape.batches())
    batch = {"input_ids": tokens, "labels": tokens}
    return surgery.compile(
        program, model=model, example_inputs={"input_ids": tokens}, device=shape.device, calibration=[batch]
    )


def curve(step: Any, shape: Shape) -> list[float]:
    """The losses of `STEPS` steps, read at the end."""
    losses = [step({"input_ids": tokens, "labels": tokens}).loss for tokens in shape.batches()]
    return torch.stack(losses).tolist()


def plain_curve(case: Case, shape: Shape, step: Any, dtype: torch.dtype = torch.float32) -> list[float]:
    """The same by plain torch in float32, from the tensors that `step` starts with and W rounded to `dtype`."""
    model = shape.model(case.sparse).to(shape.device, dtype).float()
    factors = {
        f"{path}.weight": {name: tensor.detach().float().clone().requires_grad_(tensor.requires_grad)
                           for name, tensor in tensors.items()}
        for path, tensors in step.parameters_by_site.items()
    }  # fmt: skip
    weights = {name: model.get_parameter(name).detach().clone() for name in factors}
    trained = [tensor for tensors in factors.values() for tensor in tensors.values() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def adapted() -> dict[str, Tensor]:
        return {name: case.formula(weights[name], tensors, case.numbers) for name, tensors in factors.items()}

    losses = []
    for number, tokens in enumerate(shape.batches()):
        present = adapted()
        logits = functional_call(model, present, (), {"input_ids": tokens}).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
        if case.ratio and number > 0:  # `step > start`, counted from 0
            with torch.no_grad():
                moved = adapted()
                for name, weight in weights.items():
                    weight += case.ratio * (moved[name] - present[name])
    return torch.stack(losses).tolist()


def distance(losses: list[float], plain: list[float]) -> float:
    """The largest difference of two curves at a step, as a share of the first loss."""
    return max(abs(one - other) for one, other in zip(losses, plain, strict=True)) / plain[0]
