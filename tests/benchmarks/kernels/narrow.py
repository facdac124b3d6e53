"""The narrow passes of a low-rank linear beside torch's products, in several cuts of the work, on one GPU.

    python -m tests.benchmarks.kernels.narrow

Under a minute. Times are of CUDA graphs over rotating inputs, more than a cache holds: clearing the cache before each
call leaves lines in it that have yet to be written, and a pass of a few microseconds then pays for writing them. (Timed
that way the product took 16.3 us at 8192 x 2048, rank 16, in five cuts that have little in common, and torch's 17.1.)

Predicted on an H200, microseconds, for bfloat16, rank 16 and factors in float32, where one read of the matrix takes 7.9
(8192 x 2048) and 31.6 (8192 x 8192) at 4.25 TB/s: reading alone 8.5 to 9.5, 32 to 33; the product 10, 36; both
gradients of a site 12 to 13, 40, where torch takes 20 to 24, 66; the gradients to the rights 10 to 11, 35. Starting the
sums early saves 1 to 2. Queries, keys and values in one launch 17, torch's products 45. From rank 64 on the parts of du
are as many bytes as dy, and torch should win both gradients. A call keeps the host for 15 (product) to 40 (gradients).

A run decides the blocks in `kernels/low_rank/choice.py`, and up to which rank both gradients are one pass.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from surgery.compiler.kernels.forms import ceil_div
from surgery.compiler.kernels.low_rank import narrow, plain
from surgery.compiler.kernels.low_rank.narrow import Blocks

SHAPES = [
    (8192, 2048, 16), (8192, 8192, 16), (8192, 512, 16), (8192, 14336, 16), (1024, 2048, 16), (32768, 2048, 16),
    (8192, 2048, 4), (8192, 2048, 48), (8192, 2048, 64), (8192, 2048, 128),
]  # fmt: skip
ROTATED = 400_000_000  # bytes of the inputs that take turns
SECONDS = 50  # no new shape after that

# rows and columns of a block, stages, warps; and parts, for the other passes as programs at a time on a multiprocessor
CUTS: dict[str, list[tuple[int, int, int, int, int]]] = {
    "product": [
        (64, 128, 4, 4, 1), (64, 64, 6, 4, 1), (64, 256, 3, 4, 1), (32, 128, 4, 4, 1), (16, 256, 4, 4, 1),
        (64, 128, 4, 4, 2), (128, 64, 6, 4, 2), (64, 128, 4, 4, 8), (64, 64, 4, 4, 1),
    ],
    "gradients": [
        (64, 256, 4, 8, 1), (64, 256, 4, 4, 1), (64, 128, 4, 4, 2), (64, 128, 4, 4, 3), (64, 512, 3, 8, 1),
        (64, 512, 2, 8, 1), (128, 256, 3, 8, 1), (128, 128, 3, 4, 2), (128, 64, 4, 4, 3),
    ],
    "rights": [
        (64, 128, 6, 4, 1), (64, 128, 4, 4, 2), (128, 128, 3, 4, 2), (128, 64, 5, 4, 2), (64, 256, 5, 4, 1),
        (128, 64, 4, 4, 3), (256, 64, 4, 4, 1), (64, 64, 6, 4, 4),
    ],
}  # fmt: skip
Pass = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Shape:
    """One wide matrix in the place of x and of dy, and what is narrow beside it."""

    rows: int
    width: int
    u: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def drawn(cls, rows: int, width: int, rank: int) -> Shape:
        """Of a rank."""
        left, right = torch.randn(width, rank, device="cuda"), torch.randn(rank, width, device="cuda")
        return cls(rows, width, torch.randn(rows, rank, device="cuda").bfloat16(), left, right)

    def blocks(self, name: str, cut: tuple[int, int, int, int, int]) -> Blocks:
        """The blocks of one of `CUTS`."""
        rows, columns, stages, warps, parts = cut
        if name != "product":
            parts = min(132 * parts // ceil_div(self.width, columns), ceil_div(self.rows, rows), narrow.MOST_PARTS)
        return Blocks(rows, columns, max(1, parts), stages, warps)

    def run(self, name: str, x: Tensor, blocks: Blocks | None = None) -> Sequence[Tensor]:
        """One of the passes, in Triton."""
        if name == "product":
            return [narrow.narrow_product(x, [self.right], [2.0], blocks)]
        if name == "gradients":
            du, dlefts = narrow.narrow_gradients([x], self.u, [self.left], [2.0], blocks)
            return [du, *dlefts]
        return narrow.right_gradients(self.u, x, [self.right], blocks)

    def run_torch(self, name: str, x: Tensor) -> Sequence[Tensor]:
        """The same by torch's products, casts of the factors included."""
        if name == "product":
            return [plain.narrow_product(x, [self.right], [2.0])]
        if name == "gradients":
            du, dlefts = plain.narrow_gradients([x], self.u, [self.left], [2.0])
            return [du, *dlefts]
        return plain.right_gradients(self.u, x, [self.right])

    def wanted(self, name: str, x: Tensor) -> list[Tensor]:
        """The same in float64."""
        wide, u = x.double(), self.u.double()
        if name == "product":
            return [2.0 * wide @ self.right.bfloat16().double().T]
        if name == "gradients":
            return [2.0 * wide @ self.left.bfloat16().double(), wide.T @ u]
        return [u.T @ wide]


def compiled(share: int) -> None:
    """Put a share of all forms into Triton's cache."""
    for rows, width, rank in SHAPES:
        shape, x = Shape.drawn(rows, width, rank), drawn(rows, width)
        for name, cuts in CUTS.items():
            for place, cut in enumerate([*cuts, None]):
                if place % 12 == share:
                    attempt(shape, name, x, cut and shape.blocks(name, cut))


def attempt(shape: Shape, name: str, x: Tensor, blocks: Blocks | None) -> Sequence[Tensor] | None:
    """The pass; None where the cut does not fit on the card, which must not end the table."""
    from triton.runtime.errors import OutOfResources

    torch.full((1 << 26,), float("nan"), device="cuda")  # what the allocator gives next is full of it
    try:
        return shape.run(name, x, blocks)
    except OutOfResources:
        return None


def drawn(rows: int, width: int) -> Tensor:
    """A wide matrix."""
    return torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)


def microseconds(run: Callable[[Tensor], object], inputs: list[Tensor]) -> float:
    """The median time of a call, from replays of a graph with one call for each input."""
    run(inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            run(x)
    graph.replay()
    times: list[float] = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 500 / len(inputs))
    return sorted(times)[2]


def rotated(rows: int, width: int) -> list[Tensor]:
    """As many matrices as more than fill the cache."""
    return [drawn(rows, width) for _ in range(max(6, min(64, ROTATED // (2 * rows * width))))]


def error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative difference; infinite where a number is missing."""
    pairs = zip(got, wanted, strict=True)
    return max(float(((one.double() - want).norm() / want.norm()).nan_to_num(torch.inf)) for one, want in pairs)


def table(rows: int, width: int, rank: int) -> Iterator[str]:
    """The lines of one shape."""
    shape, inputs = Shape.drawn(rows, width, rank), rotated(rows, width)
    reading = microseconds(lambda x: x.view(torch.int32).sum(), inputs)
    yield f"{rows} x {width}, rank {rank}: at 4.25 TB/s {rows * width * 2 / 4.25e6:.1f}, torch's sum {reading:.1f}"
    for name, cuts in CUTS.items():
        found, wanted = [], shape.wanted(name, inputs[0])
        for cut in [None, *cuts]:
            blocks = cut and shape.blocks(name, cut)
            got = attempt(shape, name, inputs[0], blocks)
            if got is None:
                continue
            distance = error(got, wanted)
            time = microseconds(partial(shape.run, name, blocks=blocks), inputs)
            label = "chosen" if cut is None else "/".join(map(str, cut))
            found.append((time, label + (f" WRONG {distance:.0e}" if distance > 6e-3 else "")))
        torch_time = microseconds(partial(shape.run_torch, name), inputs)
        chosen = next((time for time, label in found if label.startswith("chosen")), torch.nan)
        best = ", ".join(f"{time:.1f} {label}" for time, label in sorted(found)[:4])
        yield f"  {name:9} torch {torch_time:5.1f} chosen {chosen:5.1f} | {best} | slowest {max(found)[0]:.1f}"
        if name != "product" and rank == 16 and rows == 8192:
            with mock.patch.object(narrow, "_starts_early", lambda device: False):
                time = microseconds(partial(shape.run, name), inputs)
            yield f"            sums not started early {time:.1f}"


def sites() -> Iterator[str]:
    """Queries, keys and values, 2048 to 2048, 512 and 512: one launch for all."""
    outs, inputs = (2048, 512, 512), rotated(8192, 2048)
    u, keys = torch.randn(8192, 48, device="cuda").bfloat16(), drawn(8192, 512)
    lefts = [torch.randn(out, 16, device="cuda") for out in outs]
    rights = [torch.randn(16, 2048, device="cuda") for _ in outs]
    scales = [1.0, 2.0, 3.0]
    passes: list[tuple[str, Callable[[Any, Tensor], object]]] = [
        ("product", lambda form, x: form.narrow_product(x, rights, scales)),
        ("gradients", lambda form, x: form.narrow_gradients([x, keys, keys], u, lefts, scales)),
        ("rights", lambda form, x: form.right_gradients(u, x, rights)),
    ]
    for (name, run), form in product(passes, (plain, narrow)):
        time = microseconds(partial(run, form), inputs)
        yield f"three sites: {name} by {form.__name__.rpartition('.')[2]} {time:.1f}"


def on_the_host() -> Iterator[str]:
    """How long a call keeps Python, at a size that the device is through with at once."""
    shape, x = Shape.drawn(64, 256, 16), drawn(64, 256)
    for name in CUTS:
        times = []
        for run in (shape.run_torch, shape.run):
            run(name, x)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                run(name, x)
            times.append((time.perf_counter() - start) / 200 * 1e6)
            torch.cuda.synchronize()
        yield f"host: {name} by torch {times[0]:.0f}, by Triton {times[1]:.0f}"


def main() -> None:
    """Print the tables."""
    start = time.perf_counter()
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compiled, range(12)))
    print(f"compiled in {time.perf_counter() - start:.0f} s, microseconds:", flush=True)
    for lines in (on_the_host(), sites(), *(table(*shape) for shape in SHAPES)):
        if time.perf_counter() - start > SECONDS:
            print("the time is up")
            break
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
