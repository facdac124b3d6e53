"""The plan's quantized weights in a model: linear layers in place, each replaced by one that holds codes and scales."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery.compiler.algebra.recorder import called
from surgery.compiler.kernels.quantized_linear import (
    dequantized,
    layout,
    load_bitsandbytes,
    quantized,
    quantized_linear,
    sides,
)
from surgery.compiler.plan import Plan
from surgery.compiler.weights import Layout, module_layout
from surgery.runtime.extras import needed
from surgery.runtime.places import span_of

Place = tuple[nn.Module, str]  # a module and the name of a part of it
Held = tuple[nn.Parameter, nn.Parameter]  # codes and scales


class QuantizedLinear(nn.Module):
    """`x @ W.T + b` for x `[..., in]`, W `[out, in]` in codes (`weight`) and float32 scales (`weight_scale`), frozen.

    Dense ones of the same numbers are `nn.Linear`, or transformers' Conv1D where that stood here.
    """

    def __init__(self, original: nn.Module, held: Held) -> None:
        super().__init__()
        self.weight, self.weight_scale = held
        self.bias = original.bias
        self.out_features, self.in_features = sides(self.weight)
        self.dtype = original.get_parameter("weight").dtype
        self.dense_class = type(original)
        self.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        """Rows `[..., out]` in x's dtype."""
        result: Tensor = called(quantized_linear, x, self.weight, self.weight_scale, self.bias)
        return result

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """A layer of the class that stood here, with the weight that the codes stand for, in its dtype."""
        matrix = dequantized(self.weight, self.weight_scale, self.dtype)
        transposed = not issubclass(self.dense_class, nn.Linear)
        with torch.device("meta"):
            made = (
                self.dense_class(self.out_features, self.in_features)
                if transposed
                else nn.Linear(self.in_features, self.out_features)
            )
        made.weight = nn.Parameter(matrix.T.contiguous() if transposed else matrix, requires_grad=False)
        made.bias = self.bias
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and dtypes, for `print(model)`."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.weight.dtype}, {self.dtype}"
        )


def quantize_model(
    model: nn.Module, plan: Plan, device: torch.device | None = None, *, contents: bool = True
) -> nn.Module:
    """Replace the plan's weights in place, one by one: no more than one is there both ways. Gives the model.

    Each is quantized on `device`, where all else goes too; on its own where that is left out. Without `contents` the
    codes are zeros, and nothing is computed. Raises SURG063 where bitsandbytes is missing.
    """
    assert plan.quantized is not None
    if contents:
        with suppress(ImportError):  # which `needed` says in its own way
            load_bitsandbytes()
        span = span_of(plan.quantized.place, Path(plan.file).parent)
        needed("bitsandbytes", "quantize", f"`quantize = {plan.quantized.kind}`", span)
    known: dict[int, tuple[nn.Module, nn.Module]] = {}  # layers of several names, and what stands for them
    tied: dict[int, tuple[Tensor, Held]] = {}  # the same for weights of several layers
    names = dict(model.named_parameters(remove_duplicate=False))
    shared = _several(names[name] for name in plan.quantized.weights)
    del names
    for name in plan.quantized.weights:
        parent, part = _place(model, name)
        layer: nn.Module = getattr(parent, part)
        if isinstance(layer, QuantizedLinear):  # by another path to its parent
            continue
        weight = layer.get_parameter("weight")
        if id(layer) not in known:
            several = id(weight) in shared
            held = tied[id(weight)][1] if id(weight) in tied else _held(layer, plan.quantized.kind, device, contents)
            made = QuantizedLinear(layer, held)
            if several:
                tied[id(weight)], known[id(layer)] = (weight, held), (layer, made)
        else:
            made = known[id(layer)][1]  # type: ignore[assignment]
        setattr(parent, part, made)
        del layer, weight
    return model if device is None else model.to(device)


def quantized_copy(model: nn.Module, plan: Plan, *, contents: bool = True) -> nn.Module:
    """A model of its own with the plan's weights quantized, which shares all others; `model` is left as it is."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: nn.Module = copy.deepcopy(model, shared)
    return quantize_model(twin, plan, contents=contents)


@contextmanager
def quantizing(model: nn.Module, plan: Plan, device: torch.device | None = None) -> Iterator[None]:
    """Quantize a model in place, and put its layers back if what is done inside fails."""
    if plan.quantized is None:
        yield
        return
    layers = [(*_place(model, name), model.get_submodule(_layer(name))) for name in plan.quantized.weights]
    try:
        quantize_model(model, plan, device)
        yield
    except BaseException:
        for parent, part, layer in layers:
            setattr(parent, part, layer)
        raise


def dense_model(model: nn.Module) -> nn.Module:
    """The model with dense layers again, in place: with what their codes stand for."""
    made: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, part in parent._modules.items():
            if isinstance(part, QuantizedLinear):
                setattr(parent, name, made.setdefault(id(part), part.dense()))
    return model


def _held(layer: nn.Module, kind: str, device: torch.device | None, contents: bool) -> Held:
    known = module_layout(layer)
    assert isinstance(known, Layout)
    weight = layer.get_parameter("weight").detach()
    if contents:
        matrix = weight.to(weight.device if device is None else device)
        codes, scales = quantized(matrix.T.contiguous() if known.transposed else matrix, kind)
    else:
        shape, dtype, count = layout(kind, known.outputs, known.inputs)
        codes = torch.zeros(shape, dtype=dtype, device=weight.device)
        scales = torch.zeros(count, device=weight.device)
    return nn.Parameter(codes, requires_grad=False), nn.Parameter(scales, requires_grad=False)


def _several(weights: Iterator[nn.Parameter]) -> set[int]:
    """Identities of what comes more than once."""
    seen: set[int] = set()
    return {id(weight) for weight in weights if id(weight) in seen or seen.add(id(weight))}  # type: ignore[func-returns-value]


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _place(model: nn.Module, name: str) -> Place:
    """Where the layer of a weight is."""
    path, _, part = _layer(name).rpartition(".")
    return model.get_submodule(path), part
