"""LoKO: a Kalman filter over what is trained, with one variance per number.

The model is a measurement of its trained numbers, theta: for a row it gives h(theta), a vector of c outputs (the
probabilities of classes, or predicted numbers), which should be y. With H the Jacobian of the outputs of all rows of a
step, `[rows * c, numbers]`, p the variances and R the covariance `[c, c]` of what a row's outputs miss,

    e = y - h(theta)
    R = beta * R + (1 - beta) * mean over rows of (e @ e.T + H @ diag(p) @ H.T)
    C = H @ diag(p) @ H.T + blockdiag(R, R, ...)
    theta = theta + lr * diag(p) @ H.T @ inverse(C) @ e
    p = p * (1 - p * diagonal(H.T @ inverse(C) @ H))

p begins as `variance`, R as `noise` on the diagonal. There is no learning rate, lr is what the schedule makes of 1.
Each output of each row is a backward pass, and H is kept: rows and outputs must be few. Abdi et al. 2024,
arXiv:2410.11551; the equations are those of an extended Kalman filter with a diagonal covariance, and an exponential
mean for R.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.compiler.settings import at_least, share, wholes
from surgery.optimizers import optimizer
from surgery.optimizers.rounding import round_stochastically


@optimizer(
    "loko", needs="jacobian", defaults={"lr": 1.0},
    variance=at_least(0, above=True), noise=at_least(0, above=True), beta=share, tokens=wholes(0),
)  # fmt: skip
class Loko(torch.optim.Optimizer):
    """The filter; `observe` takes what a step sees, `step` moves what is trained. State is float32, or wider.

    `tokens` say in step.py which outputs of a language model are shown to it.
    """

    def __init__(
        self, groups: list[dict[str, Any]], names: Sequence[str], variance: float = 0.01, noise: float = 1.0,
        beta: float = 0.95, tokens: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__(groups, {})
        self.trained: list[Tensor] = [tensor for group in self.param_groups for tensor in group["params"]]
        self.names, self.first_variance, self.first_noise, self.beta = tuple(names), variance, noise, beta
        self.variance: list[Tensor] = []  # as the parameters
        self.noise: Tensor | None = None  # [c, c]
        # residuals [rows, c], which rows count [rows], Jacobians [rows * c, numbers]
        self._seen: list[tuple[Tensor, Tensor, list[Tensor]]] = []

    def observe(self, outputs: Tensor, targets: Tensor, known: Tensor) -> None:
        """Outputs `[rows, c]` with a graph, what they should be, and which rows count; a backward pass for each one."""
        outputs = torch.where(known.unsqueeze(-1), outputs, 0)
        residual = torch.where(known.unsqueeze(-1), targets - outputs, 0).detach()
        entries = outputs.flatten().unbind()
        jacobian = [tensor.new_zeros(len(entries), tensor.numel(), dtype=_wide(tensor)) for tensor in self.trained]
        for number, entry in enumerate(entries):
            rest = number + 1 < len(entries)
            found = torch.autograd.grad(entry, self.trained, retain_graph=rest, allow_unused=True)
            for matrix, gradient in zip(jacobian, found, strict=True):
                if gradient is not None:
                    matrix[number] = gradient.flatten()
        self._seen.append((residual, known, jacobian))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from all that was observed since the last one; nothing where that is nothing."""
        if closure is not None:
            raise RuntimeError("the filter sees outputs, not losses: it takes no closure")
        seen, self._seen = self._seen, []
        if not seen:
            return None
        residual = torch.cat([one for one, _, _ in seen]).double()
        known = torch.cat([one for _, one, _ in seen])
        self._begin(residual.shape[-1], residual.device)
        assert self.noise is not None
        jacobian = [torch.cat(matrices) for matrices in zip(*(one for _, _, one in seen), strict=True)]
        rows, outputs = residual.shape
        spread = residual.new_zeros(rows * outputs, rows * outputs)
        for matrix, variance in zip(jacobian, self.variance, strict=True):
            spread += (matrix * variance.flatten()).double() @ matrix.double().mT
        blocks = spread.view(rows, outputs, rows, outputs).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        misses = (residual.unsqueeze(-1) * residual.unsqueeze(-2) + blocks).sum(0) / known.sum().clamp(min=1)
        noise = torch.lerp(misses.to(self.noise.dtype), self.noise, self.beta)
        self.noise.copy_(torch.where(known.any(), noise, self.noise))
        eye = torch.eye(rows, dtype=spread.dtype, device=spread.device)
        root = torch.linalg.cholesky(spread + torch.kron(eye, self.noise.double()))
        weights = torch.cholesky_solve(residual.reshape(-1, 1), root)
        rates = [group["lr"] for group in self.param_groups for _ in group["params"]]
        for tensor, matrix, variance, lr in zip(self.trained, jacobian, self.variance, rates, strict=True):
            wide = matrix.double()
            move = variance * (wide.mT @ weights).view(tensor.shape).to(variance.dtype)
            moved = tensor.to(variance.dtype) + lr * move
            tensor.copy_(round_stochastically(moved) if tensor.dtype is torch.bfloat16 else moved)
            told = torch.linalg.solve_triangular(root, wide, upper=False).square().sum(0).view(tensor.shape)
            variance.mul_((1 - variance.double() * told).clamp(min=0).to(variance.dtype))
        return None

    def _begin(self, outputs: int, device: torch.device) -> None:
        if self.noise is None:
            start = self.first_variance
            self.variance = [torch.full_like(tensor, start, dtype=_wide(tensor)) for tensor in self.trained]
            self.noise = self.first_noise * torch.eye(outputs, dtype=_wide(self.trained[0]), device=device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what was observed and not used."""
        super().zero_grad(set_to_none)
        self._seen = []

    def state_dict(self) -> dict[str, Any]:
        """Variances by the names of tensors, and the covariance of what outputs miss."""
        return {"variance": dict(zip(self.names, self.variance, strict=False)), "noise": self.noise}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put a state in place, exactly."""
        noise = state_dict["noise"]
        self.noise, self.variance = None, []
        if noise is not None:
            self._begin(len(noise), self.trained[0].device)
            assert self.noise is not None
            self.noise.copy_(noise)
            for name, variance in zip(self.names, self.variance, strict=True):
                variance.copy_(state_dict["variance"][name])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


Outputs = tuple[Tensor, Tensor, Tensor]  # outputs [rows, c], what they should be, and which rows count [rows]


def class_outputs(logits: Tensor, labels: Tensor) -> Outputs:
    """Probabilities of the classes, and 1 where the label is; rows labelled -100 do not count."""
    outputs = logits.to(_wide(logits)).softmax(-1)
    targets = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1])
    return outputs, targets.to(outputs.dtype), labels != -100


def number_outputs(output: Tensor, labels: Tensor) -> Outputs:
    """Predicted numbers and the given ones; the axis of a single one may be left out of the labels."""
    outputs = output.to(_wide(output)).reshape(len(output), -1)
    return outputs, labels.to(outputs.dtype).reshape(outputs.shape), labels.new_ones(len(labels), dtype=torch.bool)


def label_outputs(logits: Tensor, labels: Tensor) -> Outputs:
    """Probabilities of each of several labels, and 0 or 1."""
    outputs = logits.to(_wide(logits)).sigmoid()
    return outputs, labels.to(outputs.dtype), labels.new_ones(len(labels), dtype=torch.bool)


def token_outputs(logits: Tensor, labels: Tensor, tokens: Sequence[int]) -> Outputs:
    """At the last place of a row that one of the `tokens` follows: its probability among them, and 1 for that one."""
    known = torch.tensor(tokens, device=logits.device)
    follows = labels[:, 1:].unsqueeze(-1) == known
    places = follows.any(-1)
    last = (places * torch.arange(1, places.shape[1] + 1, device=places.device)).argmax(-1)
    rows = torch.arange(len(labels), device=labels.device)
    chosen = logits[:, :-1][rows, last][:, known]
    return chosen.to(_wide(chosen)).softmax(-1), follows[rows, last].to(_wide(chosen)), places.any(-1)
