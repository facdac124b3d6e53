"""Lowering of a site to torch: as a branch beside the frozen product, or folded into one weight.

Every strategy equals the evaluator, forward and backward. The code is plain torch: called on tensors it computes,
called on `torch.fx.Proxy` it records the nodes of the rewritten graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from surgery.compiler.algebra.base import Base
from surgery.compiler.algebra.branch import Branch
from surgery.compiler.algebra.evaluate import Evaluator, wider
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.structures import Tensor


@dataclass(frozen=True)
class Adaptation:
    """How one site is run: its formula, its strategy, and what lowering must know of dtypes and sizes."""

    formula: MethodFormula
    strategy: str
    rows: int
    dtype: torch.dtype  # of the activation and of W
    adapter_dtypes: Mapping[str, torch.dtype]

    def __call__(
        self, x: Tensor, base: Base, bias: Tensor | None, tensors: Mapping[str, Tensor], training: Tensor | bool
    ) -> Tensor:
        """The site's output for `x` `[..., in]`; `tensors` are the method's by name."""
        if self.strategy == "fold":
            return self._fold(x, base, bias, tensors)
        return self._branch(x, base, bias, tensors, training)

    def _evaluator(self, base: Base, tensors: Mapping[str, Tensor]) -> Evaluator:
        dtypes = {**self.adapter_dtypes, "W": base.dtype}
        return Evaluator(base.base_weight, tensors, wider(base.dtype), dtypes)

    def _fold(self, x: Tensor, base: Base, bias: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        evaluator = self._evaluator(base, tensors)
        value = evaluator(self.formula.expression)
        if self.formula.form == "delta":
            value = evaluator(Expression("weight", (), self.formula.expression.shape, name="W")) + value
        weight = value if evaluator.dtype == base.dtype else value.to(base.dtype)
        return base.linear(x, weight, bias)

    def _branch(
        self, x: Tensor, base: Base, bias: Tensor | None, tensors: Mapping[str, Tensor], training: Tensor | bool
    ) -> Tensor:
        formula = self.formula
        branch = Branch(base, self._evaluator(base, tensors), self.dtype, self.rows)
        dropped = functional.dropout(x, formula.dropout, training) if formula.dropout else x
        if formula.form == "delta":
            return base.base_linear(x, bias) + branch.product(dropped, formula.expression)
        y = branch.product(dropped, formula.expression)
        if formula.dropout:  # x @ W.T + input @ (M - W).T
            y = base.base_linear(x) + (y - base.base_linear(dropped))
        return y if bias is None else y + bias
