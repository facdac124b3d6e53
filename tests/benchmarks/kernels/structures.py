"""Products with circulant and Toeplitz matrices: by Fourier transforms, and with the matrix formed.

    python -m tests.benchmarks.kernels.structures

Under a minute. 8192 rows, forward and backward, on the device alone. Measured on an H200 with torch 2.11, the time of
the host included (some 700 microseconds), the matrix built as windows of its diagonals:

    circulant, microseconds    384     768     2048    4096    8192
    transforms, bfloat16       758     1025    823     1530    2948
    matrix, bfloat16           539     575     882     2392    7321   (4096: 1408, 8192: 5620 as a view of a repetition)
    transforms, float32        737     804     651     1186    2277
    matrix, float32            633     764     4392    17319   66463

Predicted for the forms below, in bfloat16: matrix 320 at 2048 (three products of 93, and 30 to form it and to sum its
diagonals), 1200 at 4096; a frozen layer with a circulant change 500 at 2048, where the frozen one takes 188 and one
with LoRA 270 to 330.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from surgery.compiler.kernels.added_linear import added_linear
from surgery.compiler.kernels.diagonals import from_diagonals

ROWS = 8192


def both(run: Callable[..., Tensor], x: Tensor, v: Tensor, dy: Tensor) -> str:
    """Microseconds of a forward and backward on the device."""
    from triton.testing import do_bench_cudagraph

    def once() -> Any:
        leaves = x.detach().requires_grad_(), v.detach().requires_grad_()  # on the stream of the graph
        return torch.autograd.grad(run(*leaves), leaves, dy)

    try:
        return f"{1e3 * do_bench_cudagraph(once, rep=40, return_mode='median'):7.0f}"
    except Exception as error:  # one form that a graph does not take must not end the table
        return f"{type(error).__name__}: {str(error)[:40]}"


def by_transforms(x: Tensor, v: Tensor, length: int) -> Tensor:
    """As `algebra/structures/displacement.py` has it; a Toeplitz matrix takes the longer transforms."""
    spectrum = torch.fft.rfft(torch.cat((v, v.new_zeros(length - v.shape[0]))), n=length)
    product: Tensor = torch.fft.irfft(torch.fft.rfft(x.float(), n=length) * spectrum, n=length)
    return product.narrow(-1, 0, x.shape[-1]).to(x.dtype)


def circulant(v: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix of a first column, in a dtype."""
    v = v.to(dtype)
    return from_diagonals(torch.cat((v[1:], v)), v.shape[0], v.shape[0])


def by_matrix(x: Tensor, v: Tensor) -> Tensor:
    """A product of the matrix."""
    return functional.linear(x, circulant(v, x.dtype))


def beside_weight(x: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """The whole site: W's product and the matrix's, summed."""
    return added_linear(x, weight, None, circulant(v, x.dtype))


def frozen(x: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """The site without its change; v is read for a gradient to be there."""
    return functional.linear(x, weight) + 0 * v[:1].to(x.dtype)


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for side in (384, 768, 2048, 4096, 8192) if dtype == torch.bfloat16 else (384, 768, 2048):
            x, dy = (torch.randn(ROWS, side, device="cuda").to(dtype) for _ in range(2))
            v = (torch.randn(side, device="cuda") * side**-0.5).requires_grad_()
            weight = (torch.randn(side, side, device="cuda") * side**-0.5).to(dtype)
            exact = x[:64].double() @ circulant(v.detach(), torch.float64).T
            x.requires_grad_()
            forms: dict[str, Callable[..., Tensor]] = {
                "transforms": partial(by_transforms, length=side),
                "of twice the length": partial(by_transforms, length=2 * side),
                "matrix": by_matrix,
                "site": partial(beside_weight, weight=weight),
                "frozen": partial(frozen, weight=weight),
            }
            for name in ("transforms", "matrix"):
                found = forms[name](x[:64], v).double()
                assert float((found - exact).norm() / exact.norm()) < (5e-3 if dtype == torch.bfloat16 else 1e-5), name
            print(f"{dtype} {side:5d}", *(f"{name} {both(run, x, v, dy)}" for name, run in forms.items()), flush=True)


if __name__ == "__main__":
    main()
