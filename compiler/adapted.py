"""The algebra node of a rewritten graph: one site's equation, run by the reference evaluator until p7 lowers it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from surgery.compiler.algebra.base import logical
from surgery.compiler.algebra.evaluate import evaluate
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.lower import Adaptation
from surgery.compiler.plan import Site
from surgery.compiler.span import Span


class AdaptedSite(nn.Module):
    """`y = x @ W.T + input @ (W_effective - W).T + b`, by the definition, for one use of a site's weight.

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
        change = evaluate(formula.expression, base, values)
        if formula.form == "weight":
            change = change - evaluate(Expression("weight", (), formula.expression.shape, name="W"), base, values)
        if not formula.dropout:
            effective = (base.to(change.dtype) + change).to(base.dtype)
            return functional.linear(x, effective, bias)
        dropped = functional.dropout(x, formula.dropout, training)
        return functional.linear(x, base, bias) + functional.linear(dropped, change.to(x.dtype))
