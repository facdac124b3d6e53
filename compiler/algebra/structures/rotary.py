"""rotary(j, q): the rotation of a vector of q entries at position j. Su et al. 2021, arXiv:2104.09864."""

from __future__ import annotations

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import whole_of
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, counting, structure


@structure("rotary")
class Rotary(Structure):
    """`[q, q]` for an even q: `x @ R.T` turns the pair (x[k], x[k + q/2]) by the angle j * 10000^(-2k/q)."""

    arity = 2
    sizes = (1,)
    has_product = True
    wide = True
    constant = True

    def shape(self, *arguments: Expression) -> Shape:
        position, length = (argument.value for argument in arguments)
        if position is None or length is None:
            raise ShapeProblem("rotary takes a position and a size")
        if position.constant is not None and position.whole is None:
            raise ShapeProblem(f"the position of rotary is a whole number, this is {position}")
        if length.whole is not None and length.whole % 2:
            raise ShapeProblem(f"rotary turns pairs: its size is even, this is {length}")
        return (length, length)

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        like, position, length = values
        cosine, sine = _turn(like, position, length)
        half = length // 2
        diagonal = torch.diag_embed(torch.cat((cosine, cosine), -1))
        return diagonal + torch.diag_embed(sine, -half) - torch.diag_embed(sine, half)

    def product(self, node: Expression, x: Tensor, transposed: bool, *values: Tensor) -> Tensor:
        position, length = values
        cosine, sine = _turn(x, position if transposed else -position, length)
        low, high = x.narrow(-1, 0, length // 2), x.narrow(-1, length // 2, length // 2)
        return torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1)

    def product_cost(self, node: Expression, rows: int) -> int:
        return 3 * rows * whole_of(node.shape[-1])

    def is_identity(self, *arguments: Expression) -> bool:
        return arguments[0].value is not None and arguments[0].value.constant == 0


def _turn(like: Tensor, position: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles, `[q / 2]`, in the dtype of `like`."""
    exponents = counting(like, length // 2) * like.new_full((), -2 / length)
    angles = position * 10000.0**exponents
    return torch.cos(angles), torch.sin(angles)
