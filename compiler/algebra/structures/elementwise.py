"""Functions of every entry: sqrt exp abs sign round ceil relu gelu tanh sigmoid."""

from collections.abc import Callable, Sequence

import torch

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.structures import Structure, Tensor, structure

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "abs": torch.abs,
    "sign": torch.sign,
    "round": torch.round,
    "ceil": torch.ceil,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
NOT_ZERO_AT_ZERO = ("exp", "sigmoid")
STEPS = ("sign", "round", "ceil")  # flat wherever they have a slope at all


@structure(*FUNCTIONS)
class Elementwise(Structure):
    """The shape of its argument; zero at zero, except exp and sigmoid."""

    rowwise = True

    def shape(self, *arguments: Expression) -> Shape:
        return arguments[0].shape

    def learning(self, arguments: Sequence[Expression]) -> Sequence[Expression]:
        return () if self.name in STEPS else arguments

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        return FUNCTIONS[self.name](values[0])

    def is_zero(self, zeros: Sequence[bool]) -> bool:
        return zeros[0] and self.name not in NOT_ZERO_AT_ZERO

    def keeps_zeros(self, kept: Sequence[bool]) -> bool:
        return kept[0] and self.name not in NOT_ZERO_AT_ZERO
