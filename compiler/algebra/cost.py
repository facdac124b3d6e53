"""What a way to run a site costs: its lowering is run on meta tensors, forward and backward, and counted.

There is no second model of cost beside the code: the operations counted are those that the step will run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from surgery.compiler.algebra.base import Base
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.lower import Adaptation
from surgery.compiler.algebra.quantity import whole_of

FREE = frozenset(
    ("view", "t", "transpose", "permute", "detach", "expand", "unsqueeze", "squeeze", "slice", "select")
    + ("_unsafe_view", "alias", "as_strided")
)


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and bytes read and written, of one forward and backward."""

    flops: int
    bytes: int

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.flops - other.flops, self.bytes - other.bytes)


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every operation's inputs and outputs; views are free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation.overloadpacket.__name__ not in FREE:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def _count(adaptation: Adaptation | None, rows: int, outputs: int, inputs: int, dtype: torch.dtype,
           tensors: Mapping[str, torch.Tensor]) -> Cost:  # fmt: skip
    x = torch.empty(rows, inputs, dtype=dtype, device="meta", requires_grad=True)
    base = Base(torch.empty(outputs, inputs, dtype=dtype, device="meta"), False, dtype)
    with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
        y = base.base_linear(x) if adaptation is None else adaptation(x, base, None, tensors, True)
        y.backward(torch.empty_like(y))
    return Cost(flops.get_total_flops(), traffic.bytes)


def measure(formula: MethodFormula, strategy: str, rows: int, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Cost:
    """The cost of a strategy on `rows` tokens beyond the frozen site (its forward and the gradient to its input)."""
    outputs, inputs = (whole_of(size) for size in formula.shape)
    tensors = {
        tensor.name: torch.empty(
            tuple(whole_of(size) for size in tensor.shape),
            dtype=adapter_dtype, device="meta", requires_grad=tensor.role == "train",
        )
        for tensor in formula.tensors
    }  # fmt: skip
    adaptation = Adaptation(formula, strategy, rows, dtype, dict.fromkeys(tensors, adapter_dtype))
    adapted = _count(adaptation, rows, outputs, inputs, dtype, tensors)
    return adapted - _count(None, rows, outputs, inputs, dtype, {})
