"""gaussian(step)[shape], bernoulli(step, p)[shape]: random numbers of (seed, path, step), drawn where they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import whole_of
from surgery.compiler.algebra.recorder import called
from surgery.compiler.algebra.structures import Structure, Tensor, structure
from surgery.compiler.kernels import noise

NOISE = ("gaussian", "bernoulli")


class _Noise(Structure):
    """A key of the site, the step's number, and for `bernoulli` a share; the shape is the node's own."""

    internal = True  # written with its shape behind it, which `in_time.py` reads
    constant = True

    def shape(self, *arguments: Expression) -> Shape:
        raise AssertionError("noise is made with its shape")

    def learning(self, arguments: Sequence[Expression]) -> Sequence[Expression]:
        return ()

    def evaluate(self, node: Expression, *values: Tensor, wanted: Any = True) -> Tensor:
        """The numbers; zeros unless they are `wanted`."""
        sizes = list(map(whole_of, node.shape))
        more = () if wanted is True else (wanted,)
        return called(getattr(noise, self.name), *values, sizes, *more)


@structure("gaussian")
class Gaussian(_Noise):
    """Standard normal."""

    arity = 2


@structure("bernoulli")
class Bernoulli(_Noise):
    """Ones with probability p, else zeros."""

    arity = 3
