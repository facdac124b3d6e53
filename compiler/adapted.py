"""The algebra node of a rewritten graph: one site's equation, run by the reference evaluator until p7 lowers it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.compiler.algebra.base import logical
from surgery.compiler.algebra.evaluate import evaluate
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.lower import Adaptation
from surgery.compiler.algebra.rows import Rows
from surgery.compiler.plan import Site
from surgery.compiler.span import Span


class AdaptedSite(nn.Module):
    """`y = x @ W.T + input @ (W_effective - W).T + b`, or its `output` equation, by the definition, for one use of its weight.

    It holds no parameters: x, W as stored, the bias, `training` and the method's tensors (in the order of `names`)
    are arguments, so the graph shows what it reads. `adaptation` says how p7 is to lower it.
    """

    def __init__(self, site: Site, adaptation: Adaptation, span: Span | None) -> None:
        super().__init__()
        self.site = site
        self.adaptation = adaptation
        self.span = span
        self.names = tuple(tensor.name for tensor in site.tensors)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, training: bool, *tensors: Tensor) -> Tensor:
        """The output `[..., out]` for x `[..., in]`."""
        formula = self.adaptation.formula
        base = logical(weight, self.site)
        values: Mapping[str, Tensor] = dict(zip(self.names, tensors, strict=True))
        leaves = {"x": x, "y": functional.linear(x, base, bias)}
        rows = Rows(
            leaves,
            lambda node: evaluate(node, base, values).to(x.dtype),
            lambda part, matrix: torch.matmul(part, evaluate(matrix, base, values).to(part.dtype)),
            training,
        )
        if formula.form == "output":
            return rows(formula.expression)
        if formula.reads_plain_x:
            change = evaluate(self._change(formula.expression), base, values)
            return functional.linear(x, (base.to(change.dtype) + change).to(base.dtype), bias)
        y = leaves["y"]
        for term in formula.terms:
            y = y + functional.linear(rows(term.input), evaluate(self._change(term.matrix), base, values).to(x.dtype))
        return y

    def _change(self, matrix: Expression) -> Expression:
        """What is added to W: a `delta` itself, of a `weight` the difference."""
        if self.adaptation.formula.form == "delta":
            return matrix
        return Expression("subtract", (matrix, Expression("weight", (), matrix.shape, name="W")), matrix.shape)
