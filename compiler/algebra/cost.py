"""What a way to run a site costs: its lowering is run on meta tensors, forward and backward, and counted.

There is no second model of cost beside the code: the operations counted are those that the step will run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from surgery.compiler.algebra.base import KINDS, Base, Lookup
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.lower import Adaptation
from surgery.compiler.algebra.previous import leaves
from surgery.compiler.algebra.quantity import whole_of

FREE = frozenset(
    ("view", "t", "transpose", "permute", "detach", "expand", "unsqueeze", "squeeze", "slice", "select")
    + ("_unsafe_view", "alias", "as_strided")
)
PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "added_linear"))


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and bytes read and written, of one forward and backward.

    `kept` are the bytes that the forward keeps for the backward, the site's input among them, parameters not.
    """

    flops: int
    bytes: int
    kept: int

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.flops - other.flops, self.bytes - other.bytes, self.kept - other.kept)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.bytes * times, self.kept * times)


def _fourier(factor: float) -> Callable[..., int]:
    """The usual count of a fast Fourier transform, `factor` times n log2 n for each row of n."""

    def count(shape: Sequence[int], axes: Sequence[int], *rest: Any, out_shape: Any = None, **options: Any) -> int:
        # half a spectrum is shorter than its row
        sizes: list[int] = [max(pair) for pair in zip(shape, out_shape, strict=True)]
        points: int = math.prod(sizes[axis] for axis in axes)
        return round(factor * math.prod(sizes) * math.log2(max(2, points)))

    return count


TRANSFORMS = {
    torch.ops.aten._fft_r2c: _fourier(2.5),
    torch.ops.aten._fft_c2r: _fourier(2.5),
    torch.ops.aten._fft_c2c: _fourier(5),
}


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every operation's inputs and outputs; views are free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation.overloadpacket.__name__ not in FREE:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """What a forward inside keeps for its backward, each storage once, without those of `known`."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self._known = {_storage(tensor) for tensor in known}
        self._found: dict[int, Tensor] = {}  # held, so that no storage is counted under another's address
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._known:
            self._found[_storage(tensor)] = tensor
        return tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """One tensor per storage."""
        return tuple(self._found.values())

    @property
    def bytes(self) -> int:
        """The sizes of the storages."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._found.values())


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


class _DenseProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices a product of activations with a matrix `[out, in]` that is neither W nor a tensor of the method."""

    def __init__(self, sides: tuple[int, int], rows: int, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sides, self.rows, self.known = set(sides), rows, {_storage(tensor) for tensor in known}
        self.found = False

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation.overloadpacket.__name__ in PRODUCTS and self.rows in result.shape:
            matrices = [leaf for leaf in args if isinstance(leaf, Tensor) and self.rows not in leaf.shape]
            self.found |= any(
                set(leaf.shape[-2:]) == self.sides and leaf.ndim > 1 and _storage(leaf) not in self.known
                for leaf in matrices
            )
        return result


def _tensors(formula: MethodFormula, dtype: torch.dtype, rows: int, activations: torch.dtype) -> dict[str, Tensor]:
    """The method's tensors on meta, and what it reads of earlier blocks."""
    own = {
        tensor.name: torch.empty(
            tuple(whole_of(size) for size in tensor.shape),
            dtype=getattr(torch, tensor.dtype or "", dtype), device="meta", requires_grad=tensor.role == "train",
        )
        for tensor in formula.tensors
    }  # fmt: skip
    sides = _sides(formula)
    known = {**own, "W": torch.empty(sides, dtype=activations, device="meta"),
             "x": torch.empty(rows, sides[1], dtype=activations, device="meta", requires_grad=True)}  # fmt: skip
    return own | {leaf: known[name] for leaf, (name, _) in leaves(formula).items()}


def _sides(formula: MethodFormula) -> tuple[int, int]:
    outputs, inputs = (whole_of(size) for size in formula.shape)
    return outputs, inputs


def _site(kind: str, rows: int, sides: tuple[int, int], dtype: torch.dtype) -> tuple[Base, Tensor]:
    """The weight of a site and its input; convolutions and experts are counted as the matrices that they are."""
    outputs, inputs = sides
    if kind == "Embedding":
        stored = torch.empty(inputs, outputs, dtype=dtype, device="meta")
        return Lookup(stored, True, dtype, inputs), torch.empty(rows, dtype=torch.int64, device="meta")
    x = torch.empty(rows, inputs, dtype=dtype, device="meta", requires_grad=True)
    if kind in ("Norm", "Module"):
        return KINDS[kind](torch.empty(inputs, dtype=dtype, device="meta"), False, dtype), x
    return Base(torch.empty(sides, dtype=dtype, device="meta"), False, dtype), x


def _count(adaptation: Adaptation | None, site: tuple[Base, Tensor], tensors: Mapping[str, Tensor]) -> Cost:
    base, x = site
    kept = Kept([base.stored, *tensors.values()])
    with FlopCounterMode(display=False, custom_mapping=TRANSFORMS) as flops, _Traffic() as traffic:
        with kept:
            y = base.base_linear(base.input(x)) if adaptation is None else adaptation(x, base, None, tensors, True)
        if y.requires_grad:
            y.backward(torch.empty_like(y))
    return Cost(flops.get_total_flops(), traffic.bytes, kept.bytes)


def measure(
    formula: MethodFormula, strategy: str, rows: int, dtype: torch.dtype, adapter_dtype: torch.dtype,
    kind: str = "Linear", operation: str = "",
) -> Cost:  # fmt: skip
    """The cost of a strategy on `rows` tokens beyond the frozen site (its forward and the gradient to its input).

    `kind` is the class of the site's module as the plan has it, `operation` what of surgery's own
    the strategy runs with.
    """
    tensors, sides = _tensors(formula, adapter_dtype, rows, dtype), _sides(formula)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    adaptation = Adaptation(formula, strategy, rows, dtype, dtypes, operation=operation)
    adapted = _count(adaptation, _site(kind, rows, sides, dtype), tensors)
    return adapted - _count(None, _site(kind, rows, sides, dtype), {})


def branch_is_dense(formula: MethodFormula, planned: int) -> bool:
    """Whether the branch of a method multiplies x with a matrix `[out, in]` of its own, which it has to form first.

    `planned` tokens decide the order of its products; what is looked at is a run on a few rows.
    """
    sides, rows = _sides(formula), _free_rows(formula)
    tensors = _tensors(formula, torch.float32, rows, torch.float32)
    base, x = _site("Linear", rows, sides, torch.float32)
    adaptation = Adaptation(formula, "branch", planned, torch.float32, dict.fromkeys(tensors, torch.float32))
    with torch.no_grad(), _DenseProducts(sides, rows, [base.stored, *tensors.values()]) as seen:
        adaptation(x, base, None, tensors, True)
    found: bool = seen.found
    return found


def keeps_matrix(
    formula: MethodFormula, strategy: str, planned: int, dtype: torch.dtype, kind: str = "Linear", operation: str = "",
) -> bool:  # fmt: skip
    """Whether a site run so keeps a matrix of W's size for its backward that is neither W nor a tensor of the method.

    `planned` tokens decide the order of its products; `kind` and `operation` are as `measure` has them.
    """
    sides, rows = _sides(formula), _free_rows(formula)
    tensors = _tensors(formula, dtype, rows, dtype)
    base, x = _site(kind, rows, sides, dtype)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    known, kept = {_storage(tensor) for tensor in (base.stored, *tensors.values())}, list[torch.Size]()

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Adaptation(formula, strategy, planned, dtype, dtypes, operation=operation)(x, base, None, tensors, True)
    return any(shape.numel() >= math.prod(sides) and rows not in shape for shape in kept)


def _free_rows(formula: MethodFormula) -> int:
    """A few rows, as many as no axis of the method's tensors has, so that activations are known by their shapes."""
    sizes = {whole_of(size) for tensor in formula.tensors for size in tensor.shape} | set(_sides(formula))
    return next(number for number in range(2, len(sizes) + 3) if number not in sizes)
