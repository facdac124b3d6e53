"""The order of a chain of matrix products that needs the fewest operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def multiplication_order(
    sizes: Sequence[int], cost: Callable[[int, int, int], int] | None = None
) -> dict[tuple[int, int], int]:
    """For every part `first..last` of the chain the place to split it: `(first..split) @ (split + 1..last)`.

    Factor k is `[sizes[k], sizes[k + 1]]`. `cost(first, split, last)` replaces the usual 2abc of one product, for
    factors that are no dense matrices. Dynamic programming, cubic in the length of the chain.
    """
    length = len(sizes) - 1

    def dense(first: int, split: int, last: int) -> int:
        return 2 * sizes[first] * sizes[split + 1] * sizes[last + 1]

    price = cost or dense
    best: dict[tuple[int, int], int] = {(k, k): 0 for k in range(length)}
    order: dict[tuple[int, int], int] = {}
    for span in range(1, length):
        for first in range(length - span):
            last = first + span
            choices = [
                (best[first, split] + best[split + 1, last] + price(first, split, last), -split)
                for split in range(first, last)
            ]
            best[first, last], split = min(choices)
            order[first, last] = -split
    return order
