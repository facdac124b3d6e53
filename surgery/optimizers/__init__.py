"""The optimizers of the language, one file each: those that torch does not have, or not for bfloat16 tensors.

A file registers what it holds under its name in the language; being in the folder is the registration. An optimizer
says what it needs of the methods that it trains (`Need`), and gets it from the plan.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from surgery.compiler.settings import Reader

# pairs         scale * left @ right, both trained, and read only as this product
# half_pairs    the same with one of the two frozen
# triples       scale * left @ core @ right, all trained, left and right with orthonormal columns and rows
# jacobian      how each of the model's outputs depends on what is trained
Need = Literal["pairs", "half_pairs", "triples", "jacobian"]
NEEDS: Mapping[Need, str] = {
    "pairs": "a product of two trained tensors that are read nowhere else, such as `B @ A`",
    "half_pairs": "a product of a trained and a frozen tensor that are read nowhere else, such as `B @ A`",
    "triples": "a product of three trained tensors that are read nowhere else, such as `U @ S @ V`, with orthogonal "
    "starts of the outer two",
    "jacobian": "a model with few outputs per row",
}
BASES = ("adamw", "sgd")


@dataclass(frozen=True)
class Kind:
    """An optimizer of the language.

    `made` is called by step.py: a class that takes the optimizer of everything else (`around` names those that it may
    be), the factors and its options. Or a function, which gives what multiplies the learning rates of tensors.
    """

    name: str
    made: Any
    arguments: Mapping[str, Reader]
    around: tuple[str, ...] = ()
    needs: Need | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    moments: Mapping[str, int] = field(default_factory=dict)  # those of the product's full size, by what it is around


OPTIMIZERS: dict[str, Kind] = {}
Made = TypeVar("Made", bound=Callable[..., Any])


def optimizer(
    name: str, *, around: tuple[str, ...] = (), needs: Need | None = None,
    defaults: Mapping[str, Any] | None = None, moments: Mapping[str, int] | None = None, **arguments: Reader,
) -> Callable[[Made], Made]:  # fmt: skip
    """Register an optimizer under its name; `arguments` are read in the language, by these kinds.

    What is left out in a spec has the default of `made`; `defaults` are those of the optimizer of everything else.
    """

    def register(made: Made) -> Made:
        if name in OPTIMIZERS:
            raise ValueError(f"two optimizers are called {name}")
        signature = inspect.signature(made).parameters
        own = {key: signature[key].default for key in arguments if needs and key in signature}
        OPTIMIZERS[name] = Kind(name, made, arguments, around, needs, own | dict(defaults or {}), moments or {})
        return made

    return register


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
