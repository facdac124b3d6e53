"""The algebra node of a rewritten graph: one site's equation, run by the reference evaluator until p7 lowers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from surgery.compiler.algebra.base import Base
from surgery.compiler.algebra.evaluate import Evaluator, evaluate
from surgery.compiler.algebra.expression import MARK, Expression
from surgery.compiler.algebra.formula import reads_rows
from surgery.compiler.algebra.inputs import Input
from surgery.compiler.algebra.lower import Adaptation
from surgery.compiler.algebra.quantity import whole_of
from surgery.compiler.algebra.rows import Rows
from surgery.compiler.plan import Site
from surgery.compiler.span import Span


class AdaptedSite(nn.Module):
    """`y = x @ W.T + input @ (W_effective - W).T + b`, or the `output` equation, by the definition, for one use of W.

    It holds no parameters: x, W as stored, the bias, `training` and the method's tensors (in the order of `names`, with
    those and the x of earlier blocks) are arguments, so the graph shows what it reads. `make_base` says how this use
    reads W, `adaptation` how p7 is to lower it.
    """

    def __init__(self, site: Site, adaptation: Adaptation, make_base: Callable[..., Base], span: Span | None) -> None:
        super().__init__()
        self.site = site
        self.adaptation = adaptation
        self.make_base = make_base
        self.span = span
        self.names = (*(tensor.name for tensor in site.tensors), *site.earlier, *site.earlier_inputs)

    def read(self, weight: Tensor, tensors: Sequence[Tensor]) -> tuple[Base, dict[str, Tensor]]:
        """How W is stored and used, and the tensors by name, from the arguments in their order."""
        count = len(self.names)
        base = self.make_base(weight, *tensors[count:])
        values = dict(zip(self.names, tensors[:count], strict=True))
        for name in self.site.earlier:
            if name.startswith(f"W{MARK}"):
                values[name] = replace(base, stored=values[name]).base_weight()
        return base, values

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, training: bool, *tensors: Tensor) -> Tensor:
        """The site's output for its own x; behind the method's tensors come those that its kind of weight reads."""
        formula = self.adaptation.formula
        base, values = self.read(weight, tensors)
        given = base.input(x)
        row = given.dense() if isinstance(given, Input) else given
        reads = formula.form != "output" or reads_rows(formula.expression, "y")
        leaves = {"x": given, "y": base.base_linear(given, bias) if reads else row}
        leaves |= {name: base.input(values[name]) for name in self.site.earlier_inputs}
        rows = Rows(
            leaves,
            lambda node: self._vector(row, node, base, values),
            lambda part, matrix: self._times(part, matrix, base, values, transposed=False),
            training,
        )
        y: Tensor = leaves["y"]
        if formula.form == "output":
            y = rows(formula.expression)
        elif formula.reads_plain_x:
            change = self._evaluated(formula.change(formula.expression), base, values)
            y = base.linear(x, (base.base_weight().to(change.dtype) + change).to(base.dtype), bias)
            return y
        else:
            for term in formula.terms:
                y = y + self._times(rows(term.input), formula.change(term.matrix), base, values, transposed=True)
        y = base.output(y)
        return y

    def _evaluated(self, node: Expression, base: Base, values: Mapping[str, Tensor]) -> Tensor:
        return evaluate(node, base.base_weight(), values, stacked=self.adaptation.stacked)

    def _vector(self, row: Tensor, node: Expression, base: Base, values: Mapping[str, Tensor]) -> Tensor:
        value = self._evaluated(node, base, values).to(row.dtype)
        return base.per_row(row, value, node.shape) if self._is_stacked(node) else value

    def _is_stacked(self, node: Expression) -> bool:
        return Evaluator(lambda: None, {}, self.adaptation.dtype, stacked=self.adaptation.stacked).is_stacked(node)

    def _times(
        self, part: Tensor, matrix: Expression, base: Base, values: Mapping[str, Tensor], transposed: bool
    ) -> Tensor:
        dense = self._evaluated(matrix, base, values).to(part.dtype)
        rows, columns = (whole_of(size) for size in matrix.shape)
        sides = (columns, rows) if transposed else (rows, columns)
        stack = sides if self._is_stacked(matrix) else None
        result: Tensor = base.product(part, dense, transposed=transposed, stack=stack)
        return result
