"""How wide the outputs of a model's modules are: one forward of its skeleton on the meta device, without any weight."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves


def output_sizes(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """The last size of the first floating-point output of every module that the forward reaches, by path.

    The model may be on any device and is left as it is. A forward may raise anything where a tensor has no values: then
    what it reached is known.
    """
    found: dict[str, int] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1:
                    found[path] = int(leaf.shape[-1])
                    return

        return hook

    meta = {name: tensor.detach().to("meta") for name, tensor in model.named_parameters()}
    meta |= {name: tensor.to("meta") for name, tensor in model.named_buffers()}
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    hooks = [module.register_forward_hook(watch(path)) for path, module in model.named_modules()]
    given = {name: value.to("meta") for name, value in inputs.items()}
    unmasked = {name: value for name, value in given.items() if not name.endswith("mask")}  # masks are looked into
    try:
        for attempt in (given, unmasked):
            with torch.no_grad(), torch.random.fork_rng(devices=[]), suppress(Exception):
                functional_call(model, meta, (), {**attempt, **options})
                break
    finally:
        for handle in hooks:
            handle.remove()
    return found
