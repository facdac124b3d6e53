"""Lowering of a site to torch: as a branch beside the frozen product, or folded into one weight, kept or built twice.

Every strategy equals the evaluator, forward and backward. The code is plain torch: called on tensors it computes,
called on `torch.fx.Proxy` it records the nodes of the rewritten graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from surgery.compiler.algebra.base import Base
from surgery.compiler.algebra.branch import FUSED, Branch
from surgery.compiler.algebra.evaluate import Evaluator, wider
from surgery.compiler.algebra.expression import MARK, Expression
from surgery.compiler.algebra.formula import MethodFormula, reads_rows
from surgery.compiler.algebra.narrow import narrow, summands
from surgery.compiler.algebra.norms import with_norms_by_parts
from surgery.compiler.algebra.recompute import checkpointed, gradient_factors, rebuilt
from surgery.compiler.algebra.rows import Rows
from surgery.compiler.algebra.structures import Tensor
from surgery.compiler.algebra.updated import built, updated


@dataclass(frozen=True)
class Adaptation:
    """How one site is run: its formula, its strategy, and what lowering must know of dtypes and sizes."""

    formula: MethodFormula
    strategy: str
    rows: int
    dtype: torch.dtype  # of the activation and of W
    adapter_dtypes: Mapping[str, torch.dtype]
    stacked: frozenset[str] = frozenset()  # what has the axis of the experts in front
    operation: str = ""  # of surgery's own, that a branch runs with; empty: plain torch
    training: Any = 0  # what the equation reads by that name, where it is run

    def __call__(
        self, x: Tensor, base: Base, bias: Tensor | None, tensors: Mapping[str, Tensor], training: Tensor | bool
    ) -> Tensor:
        """The site's output for `x` `[..., in]`; `tensors` are those that its method reads, by name."""
        if self.training is not training:
            return replace(self, training=training)(x, base, bias, tensors, training)
        if self.strategy == "fold":
            return base.linear(x, self.weight(base, tensors, self.formula.expression), bias)
        if self.strategy == "recompute":
            return self._recompute(x, base, bias, tensors)
        return self._branch(x, base, bias, tensors, training)

    def _evaluator(self, base: Base, tensors: Mapping[str, Tensor]) -> Evaluator:
        dtypes = {**self.adapter_dtypes, "W": base.dtype}
        return Evaluator(base.base_weight, tensors, wider(base.dtype), dtypes, self.stacked, self.training)

    def weight(self, base: Base, tensors: Mapping[str, Tensor], expression: Expression) -> Tensor:
        """The effective weight `[out, in]` by the method's expression, rounded once."""
        evaluator = self._evaluator(base, tensors)
        weight = Expression("weight", (), expression.shape, name="W")
        is_change = self.formula.form == "delta"
        whole = Expression("add", (weight, expression), expression.shape) if is_change else expression
        if not self.stacked and (found := updated(whole)):
            return built(found, evaluator)
        value = evaluator(expression)
        if is_change:
            value = evaluator(weight) + value
        return value if evaluator.dtype == base.dtype else value.to(base.dtype)

    def _recompute(self, x: Tensor, base: Base, bias: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        factors = gradient_factors(self.formula) if base.is_matrix else None
        if factors is None:
            return checkpointed(self.formula, self.weight, x, base, bias, tensors)
        branch = Branch(base, self._evaluator(base, tensors), self.dtype, self.rows)
        sides = tuple(map(branch.cast, factors))
        return rebuilt(self.formula, self.weight, sides, x, base, bias, tensors)

    def _branch(
        self, x: Tensor, base: Base, bias: Tensor | None, tensors: Mapping[str, Tensor], training: Tensor | bool
    ) -> Tensor:
        formula = self.formula if self.stacked else with_norms_by_parts(self.formula)
        fused = self.operation == FUSED and base.is_matrix and base.dtype == self.dtype
        branch = Branch(base, self._evaluator(base, tensors), self.dtype, self.rows, fused)
        row = base.input(x)
        leaves = {"x": row} | {name: base.input(tensors[name]) for name in tensors if name.startswith(f"x{MARK}")}
        rows = Rows(
            leaves,
            lambda node: branch.vector(x, node),
            lambda part, matrix: branch.product(part, matrix, False),
            training,
        )
        if formula.form == "output":
            if reads_rows(formula.expression, "y"):
                leaves["y"] = base.base_linear(row, bias)
            return base.output(rows(formula.expression))
        if formula.form == "delta":
            terms = [(rows.input(term.input), term.matrix) for term in formula.terms]
            first = next((number for number, (_, matrix) in enumerate(terms) if fused and narrow(matrix)), 0)
            y = branch.adapted(row, *terms.pop(first), bias)
            return base.output(sum((branch.product(inside, matrix) for inside, matrix in terms), y))
        (term,) = formula.terms
        inside = rows.input(term.input)
        apart = not term.reads_plain_x or any(part.operation == "weight" for part in summands(term.matrix))
        if fused and apart and narrow(formula.change(term.matrix)):
            return branch.adapted(row, inside, formula.change(term.matrix), bias)
        y = branch.product(inside, term.matrix)
        if not term.reads_plain_x:  # x @ W.T + input @ (M - W).T
            y = branch.base_linear(row) + (y - branch.base_linear(inside))
        return base.output(y if bias is None else y + bias)
