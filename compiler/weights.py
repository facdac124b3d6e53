"""Which weights can be adapted: what W is of a module, or of a parameter that has no module of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.compiler.plan import ModuleClass


@dataclass(frozen=True)
class Layout:
    """How a parameter holds W `[outputs, inputs]`."""

    module_class: ModuleClass
    outputs: int
    inputs: int
    transposed: bool = False
    experts: int | None = None
    kernel: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Weight:
    """One adaptable weight: W is `[outputs, inputs]`, whatever the storage."""

    path: str
    parameter: str  # empty for a module without a weight, of which only the output is adapted
    layout: Layout
    bias: bool
    identity: int  # equal for weights that share storage
    dtype: str

    @property
    def outputs(self) -> int:
        """Rows of W."""
        return self.layout.outputs

    @property
    def inputs(self) -> int:
        """Columns of W."""
        return self.layout.inputs

    @property
    def home(self) -> str:
        """The path below which the method's tensors are: a parameter is no module, so it gets one beside it."""
        return f"{self.path}_adapter" if self.path == self.parameter else self.path


def module_layout(module: nn.Module) -> Layout | str | None:
    """W of a module's `weight`: its layout, the reason why it cannot be adapted, or None for a class without one."""
    weight = getattr(module, "weight", None)
    if type(module) is nn.Linear or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward):
        return Layout("Linear", module.out_features, module.in_features)
    if not isinstance(weight, nn.Parameter) or isinstance(module, nn.Linear) or type(module).__name__ == "Adapted":
        return None
    sizes = tuple(map(int, weight.shape))
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' linear layer of GPT-2
        return Layout("Conv1D", sizes[1], sizes[0], transposed=True)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "an embedding with `max_norm` changes its weight as it reads it"
        return Layout("Embedding", sizes[1], sizes[0], transposed=True)
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"it has {module.groups} groups, each with a matrix of its own"
        return Layout("Conv2d", sizes[0], sizes[1] * sizes[2] * sizes[3], kernel=(sizes[2], sizes[3]))
    if is_norm(module) and len(sizes) == 1:
        return Layout("Norm", sizes[0], sizes[0])
    known = type(module).__module__.startswith("torch.nn.")
    if len(sizes) == 2 and not module._modules and not known:  # whether it multiplies with it, the graph will show
        return Layout("Parameter", sizes[0], sizes[1])
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module scales its normalised input by a vector; RMSNorms of transformers are told by their names."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def parameter_layout(owner: nn.Module, parameter: nn.Parameter) -> Layout | str | None:
    """W of a parameter: a matrix `[out, in]`, or a stack of experts whose class says which axis is which."""
    sizes: tuple[int, ...] = tuple(map(int, parameter.shape))
    if len(sizes) == 2:
        return Layout("Parameter", sizes[0], sizes[1])
    if len(sizes) != 3:
        return None
    transposed: Any = getattr(owner, "is_transposed", None)
    if not isinstance(transposed, bool):
        return f"{type(owner).__name__} does not say whether its experts are stored as [out, in] or as [in, out]"
    outputs, inputs = (sizes[2], sizes[1]) if transposed else (sizes[1], sizes[2])
    return Layout("Experts", outputs, inputs, transposed, experts=sizes[0])
