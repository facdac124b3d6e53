"""Singular vectors and values, and the factors of a QR decomposition: for starts alone."""

from __future__ import annotations

from surgery.compiler.algebra.decompose import orthogonal_triangular, singular
from surgery.compiler.algebra.expression import Expression, Shape
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.structures import ShapeProblem, Structure, Tensor, structure

PARTS = {"left_singular": 0, "singular_values": 1, "right_singular": 2, "qr_q": 0, "qr_r": 1}


@structure(*PARTS)
class Decomposition(Structure):
    """`[m, n]` and r to `[m, r]` (left_singular, qr_q), `[r]` (singular_values) or `[r, n]` (right_singular, qr_r).

    A negative r takes the smallest |r| singular triples.
    """

    arity = 2

    def shape(self, *arguments: Expression) -> Shape:
        matrix, count = arguments
        if len(matrix.shape) < 2:
            raise ShapeProblem(f"{self.name} takes a matrix")
        if count.value is None:
            raise ShapeProblem(f"{self.name} takes how many as a number, behind the matrix")
        rank = count.value
        known = rank.constant
        if known is not None:
            if rank.whole is None or known == 0 or (known < 0 and self.name.startswith("qr")):
                raise ShapeProblem(f"{self.name} takes a whole number of at least 1, this is {rank}")
            rank = Quantity.of(abs(int(known)))
            for side in matrix.shape[-2:]:
                if side.whole is not None and abs(int(known)) > side.whole:
                    raise ShapeProblem(f"{self.name} of {abs(int(known))}, where there are {side}")
        rows, columns = matrix.shape[-2:]
        leading = matrix.shape[:-2]
        sizes = {"left_singular": (rows, rank), "qr_q": (rows, rank), "singular_values": (rank,)}
        return (*leading, *sizes.get(self.name, (rank, columns)))

    def evaluate(self, node: Expression, *values: Tensor) -> Tensor:
        matrix, count = values
        decompose = orthogonal_triangular if self.name.startswith("qr") else singular
        return decompose(matrix, int(count))[PARTS[self.name]]
