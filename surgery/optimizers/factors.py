"""What optimizers share that move the factors of a product together.

The equations of a method read such factors only as `M = scale * left @ right`; the plan says which those are. With
`g = dL/dM`, `[out, in]`, which is never formed,

    dL/d left = scale * g @ right.T,    dL/d right = scale * left.T @ g

Factors of equal shapes are one batch: every operation is one launch for all their sites. Arithmetic and state are
float32 (float64 for factors in float64), whatever the factors are; bfloat16 factors are rounded stochastically. What is
trained beside factors is left to the optimizer around which these are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.optimizers.rounding import RoundingOptimizer, round_stochastically

Eigen = tuple[Tensor, Tensor]  # values [..., rank], and vectors [..., rank, rank] as columns
Place = int | None  # of a factor from left to right; None: the product itself


@dataclass(frozen=True, eq=False)
class Factors:
    """Tensors that are read only as their product, from left to right; those that are `turned` stand transposed."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    scale: float
    turned: tuple[bool, ...]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], names: Sequence[str], scale: float, turned: Any = ()) -> Factors:
        """The factors of these names."""
        return cls(tuple(names), tuple(weights[name] for name in names), scale, turned or (False,) * len(names))

    def name(self, place: Place) -> str:
        """What the state of a factor, or of the product, is saved under."""
        return " @ ".join(self.names) if place is None else self.names[place]

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The shapes as they stand in the product."""
        return tuple(
            tensor.mT.shape if turned else tensor.shape
            for tensor, turned in zip(self.tensors, self.turned, strict=True)
        )


@dataclass(eq=False)
class Batch:
    """Factors of equal shapes and kinds; what is read of them has a leading axis `[sites]`."""

    factors: list[Factors]
    groups: tuple[int | None, ...]  # the parameter group of each factor, None for a frozen one
    state: dict[tuple[str, Place], Tensor] = field(default_factory=dict)  # [sites, ...] each

    @property
    def scale(self) -> float:
        """The number in front of the products."""
        return self.factors[0].scale

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.promote_types(self.factors[0].tensors[0].dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.factors[0].tensors[0].device

    def shape(self, place: int) -> torch.Size:
        """Of a factor at a place, as it stands in the product."""
        return self.factors[0].shapes[place]

    def values(self, place: int) -> Tensor:
        """The factors at a place, `[sites, rows, columns]`."""
        return self._stacked([one.tensors[place] for one in self.factors], place)

    def gradients(self, place: int) -> Tensor:
        """Their gradients, `[sites, rows, columns]`; raises RuntimeError where there is none."""
        found = [one.tensors[place].grad for one in self.factors]
        lacking = [one.names[place] for one, gradient in zip(self.factors, found, strict=True) if gradient is None]
        if lacking:
            raise RuntimeError(f"`{lacking[0]}` has no gradient, and the step of its partner depends on it")
        return self._stacked(found, place)  # type: ignore[arg-type]

    def put_gradients(self, place: int, values: Tensor) -> None:
        """Give the optimizer around other gradients, in this step."""
        tensors = [one.tensors[place] for one in self.factors]
        values = (values.mT if self.factors[0].turned[place] else values).to(tensors[0].dtype).contiguous()
        for tensor, value in zip(tensors, values.unbind(), strict=True):
            tensor.grad = value

    def put(self, place: int, values: Tensor) -> None:
        """Replace the factors, which this step has moved: the optimizer around leaves them alone."""
        tensors = [one.tensors[place] for one in self.factors]
        values = round_stochastically(values) if tensors[0].dtype is torch.bfloat16 else values
        values = values.mT if self.factors[0].turned[place] else values
        torch._foreach_copy_(tensors, list(values.unbind()))
        for tensor in tensors:
            tensor.grad = None

    def _stacked(self, tensors: list[Tensor], place: int) -> Tensor:
        stacked = torch.stack(tensors).to(self.dtype)
        return stacked.mT if self.factors[0].turned[place] else stacked


class FactorOptimizer(torch.optim.Optimizer):
    """An optimizer of factors around the one of everything else; a subclass says what a step does to a batch.

    Parameter groups are those of `base`, rates and schedules too.
    """

    def __init__(self, base: torch.optim.Optimizer, factors: Iterable[Factors]) -> None:
        self.base = base
        super().__init__(base.param_groups, {})
        self.steps = 0
        self.batches = self._batches(factors)

    def _batches(self, factors: Iterable[Factors]) -> list[Batch]:
        number = {tensor: index for index, group in enumerate(self.param_groups) for tensor in group["params"]}
        found: dict[tuple[object, ...], Batch] = {}
        for one in factors:
            groups = tuple(number.get(tensor) for tensor in one.tensors)
            kinds = tuple((tensor.dtype, tensor.device) for tensor in one.tensors)
            batch = found.setdefault((one.shapes, one.turned, one.scale, kinds, groups), Batch([], groups))
            batch.factors.append(one)
        return list(found.values())

    def rate(self, batch: Batch, place: int) -> tuple[float, float]:
        """The learning rate and weight decay of the factors at a place."""
        number = batch.groups[place]
        assert number is not None
        return self.param_groups[number]["lr"], self.param_groups[number]["weight_decay"]

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Move the factors of a batch, or change their gradients for the optimizer around; `steps` counts from 1."""

    def start(self, batch: Batch) -> dict[tuple[str, Place], Tensor]:
        """The state of a batch before its first step, by name and by what it is of."""
        return {}

    def before(self) -> None:
        """What is done once before all batches are updated."""

    def grams(self) -> dict[tuple[Batch, int], Eigen]:
        """The `eigen` of each factor's product with itself, `[sites, rank, rank]`, by its place in the pair."""
        places = [(batch, place) for batch in self.batches for place in (0, 1)]
        matrices = [gram(batch.values(1).mT if place else batch.values(0)) for batch, place in places]
        return dict(zip(places, together(matrices), strict=True))

    def after(self, batch: Batch) -> None:
        """What is done to a batch once the optimizer around has taken its step."""

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Start anew with tensors that now mean something else, and with the products that they are factors of."""
        given = set(tensors)
        for tensor in given:
            self.base.state.pop(tensor, None)
        for batch in self.batches:
            for number, one in enumerate(batch.factors):
                places = {place for place, tensor in enumerate(one.tensors) if tensor in given}
                for (_, of), values in batch.state.items() if places else ():
                    if of is None or of in places:
                        values[number].zero_()
        if isinstance(self.base, RoundingOptimizer):
            self.base.forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of everything that is trained."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._begin()
        self.steps += 1
        factors = {tensor: tensor.grad for batch in self.batches for one in batch.factors for tensor in one.tensors}
        self.before()
        for batch in self.batches:
            self.update(batch)
        self.base.step()
        for batch in self.batches:
            self.after(batch)
        for tensor, gradient in factors.items():
            tensor.grad = gradient  # events after the step read it as it was
        return loss

    def _begin(self) -> None:
        for batch in self.batches:
            batch.state = batch.state or self.start(batch)

    def state_dict(self) -> dict[str, Any]:
        """The state by the names of tensors, and that of the optimizer around."""
        factors: dict[str, dict[str, Tensor]] = {}
        for batch in self.batches:
            for (name, place), values in batch.state.items():
                for one, value in zip(batch.factors, values, strict=True):
                    factors.setdefault(one.name(place), {})[name] = value
        return {"base": self.base.state_dict(), "steps": self.steps, "factors": factors}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put a state in place, exactly."""
        self.base.load_state_dict(state_dict["base"])
        self.param_groups = self.base.param_groups
        self.steps = int(state_dict["steps"])
        for batch in self.batches:
            batch.state = self.start(batch) if self.steps else {}
            for (name, place), values in batch.state.items():
                for one, value in zip(batch.factors, values, strict=True):
                    value.copy_(state_dict["factors"][one.name(place)][name])


def gram(matrix: Tensor) -> Tensor:
    """`matrix.T @ matrix` in float64, which keeps all digits that float32 factors have: `[..., rank, rank]`.

    What is not finite counts as 0: a decomposition would raise where the step's result shows it anyway.
    """
    wide = torch.nan_to_num(matrix.double(), nan=0.0, posinf=0.0, neginf=0.0)
    return wide.mT @ wide


def eigen(matrix: Tensor) -> Eigen:
    """Eigenvalues `[..., rank]` of a positive semidefinite matrix, those of rounding as 0, and eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    least = values[..., -1:] * values.shape[-1] * torch.finfo(values.dtype).eps
    return torch.where(values > least, values, 0), vectors


def reciprocal(values: Tensor) -> Tensor:
    """1 / values, and 0 where a value is 0: the pseudo-inverse."""
    return torch.where(values > 0, 1 / values, 0)


def inverse(found: Eigen, damping: float, relative: bool = False) -> Tensor:
    """The pseudo-inverse of `matrix + damping * I` in float64, of a positive semidefinite matrix by its `eigen`.

    `relative`: the damping counts in means of the eigenvalues, so that it scales as the matrix does.
    """
    values, vectors = found
    added = damping * values.mean(-1, keepdim=True) if relative else damping
    return (vectors * reciprocal(values + added).unsqueeze(-2)) @ vectors.mT


def together(matrices: Sequence[Tensor]) -> list[Eigen]:
    """`eigen` of several batches of matrices: one launch for all of one size, however many shapes factors have."""
    found: list[Eigen | None] = [None] * len(matrices)
    kinds = [(matrix.shape[-1], matrix.device) for matrix in matrices]
    for kind in dict.fromkeys(kinds):
        numbers = [number for number, other in enumerate(kinds) if other == kind]
        flat = [matrices[number].reshape(-1, kind[0], kind[0]) for number in numbers]
        values, vectors = eigen(torch.cat(flat))
        counts = [len(one) for one in flat]
        for number, part, axes in zip(numbers, torch.split(values, counts), torch.split(vectors, counts), strict=True):
            shape = matrices[number].shape
            found[number] = part.view(shape[:-1]), axes.view(shape)
    return [one for one in found if one is not None]
