"""Whether a base that is zero in two of every four entries trains faster through the sparse tensor cores.

A frozen layer costs two products: `x @ W.T` and, backwards, `dy @ W`. The packed form multiplies groups along the
rows of what it packs, so it serves the first; the second needs groups along the columns, which W need not have, and
stays dense. A masked method moves W' in every step, so it also packs in every step. Prints the error of the product
against float64 and the medians in microseconds, with the verdict for training.

    python tests/benchmarks/semi_structured.py
    python tests/benchmarks/semi_structured.py --rows 4096 --width 2048
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured


def median(call: Callable[[], object]) -> float:
    """Microseconds of a call on the device."""
    from triton.testing import do_bench  # type: ignore[import-not-found, unused-ignore]

    return 1e3 * float(do_bench(call, warmup=20, rep=100, return_mode="median"))


def two_of_four(weight: Tensor) -> Tensor:
    """The weight with the two smallest of every four neighbours in a row at zero."""
    groups = weight.view(weight.shape[0], -1, 4)
    largest = groups.abs().topk(2, dim=-1).indices
    return torch.zeros_like(groups).scatter(-1, largest, groups.gather(-1, largest)).flatten(-2)


def main() -> None:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    x, dy = (torch.randn(chosen.rows, chosen.width, **options) for _ in range(2))  # type: ignore[call-overload]
    weight = two_of_four(torch.randn(chosen.width, chosen.width, **options) * 0.02)  # type: ignore[call-overload]
    expected = x[:256].double() @ weight.double().T
    dense = {"x @ W.T": median(lambda: functional.linear(x, weight)), "dy @ W": median(lambda: dy @ weight)}
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {chosen.rows} rows, {chosen.width} wide")
    print("dense        " + "  ".join(f"{name} {time:.1f} us" for name, time in dense.items()), flush=True)
    for name, cutlass in (("cuSPARSELt", False), ("CUTLASS", True)):
        SparseSemiStructuredTensor._FORCE_CUTLASS = cutlass
        try:
            packed = to_sparse_semi_structured(weight)
            product = functional.linear(x, packed)
            error = float((product[:256].double() - expected).norm() / expected.norm())
            forward = median(lambda: functional.linear(x, packed))  # noqa: B023
            rows = median(lambda: functional.linear(x, packed).contiguous())  # noqa: B023
            pack = median(lambda: to_sparse_semi_structured(weight))
        except (RuntimeError, NotImplementedError, ValueError) as failure:
            print(f"{name:12s} not on this build: {str(failure).strip()[:150]}", flush=True)
            continue
        whole, frozen, moving = sum(dense.values()), rows + dense["dy @ W"], rows + dense["dy @ W"] + pack
        print(
            f"{name:12s} x @ W.T {forward:.1f} us, contiguous {rows:.1f} us, packing {pack:.1f} us, error {error:.1e}"
        )
        print(f"{'':12s} forward and backward: dense 1.00, W packed once {frozen / whole:.2f}, in every step "
              f"{moving / whole:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
