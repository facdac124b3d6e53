"""How wide the outputs of a model's modules are: one forward of its skeleton, with sizes and without any weight."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import ShapeEnv
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

    # sizes without values, which transformers takes for tracing: it then looks into no mask
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def skeleton_of(tensor: Tensor) -> Tensor:
        """Of a narrow dtype, which every operation takes: some have no skeleton of a wide one."""
        found: Tensor = fake.from_tensor(tensor.detach(), static_shapes=True)
        return found.to(torch.bfloat16) if found.is_floating_point() else found

    skeleton = {name: skeleton_of(tensor) for name, tensor in held.items()}
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    hooks = [module.register_forward_hook(watch(path)) for path, module in model.named_modules()]
    device = next((tensor.device for tensor in held.values()), torch.device("cpu"))
    given = {name: skeleton_of(value.to(device)) for name, value in inputs.items()}
    try:
        with fake, torch.no_grad(), torch.random.fork_rng(devices=[]), suppress(Exception):
            functional_call(model, skeleton, (), {**given, **options})
    finally:
        for handle in hooks:
            handle.remove()
    return found
