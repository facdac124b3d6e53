"""The user's model is lent, not given: whatever capture does to it is undone, also on an error."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = ("_parameters", "_buffers", "_modules")


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore attributes, modes, configs, `requires_grad`, buffer contents and torch's random state on the way out."""
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    containers = [{name: dict(module.__dict__[name]) for name in _CONTAINERS} for module in modules]
    configs = [(config, dict(config.__dict__), _containers(config)) for config in _configs(modules)]
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    contents = buffer_contents(model)
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, fields, inside in zip(modules, attributes, containers, strict=True):
                _refill(module.__dict__, fields)
                for name, entries in inside.items():
                    _refill(module.__dict__[name], entries)
            for config, fields, nested in configs:
                changed = {name: value for name, value in nested.items() if fields[name] != value}
                _refill(config.__dict__, fields | changed)
            for parameter, requires_grad in frozen:
                parameter.requires_grad_(requires_grad)
            restore(contents)


def keep_layers(model: nn.Module) -> None:
    """Make a layer drop of probability 0 say so before it draws a number, which no graph can branch on.

    transformers 5.17 compares `torch.rand([])` with it in every layer of OPT, BART and their kin.
    """
    for module in model.modules():
        if getattr(module, "layerdrop", None) == 0:
            module.__dict__["layerdrop"] = _Never()


class _Never:
    """The probability 0: no random number is below it, and it is above nothing."""

    def __gt__(self, other: object) -> bool:
        return False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return False if function is Tensor.__lt__ else NotImplemented


def buffer_contents(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Every buffer that has contents, with a copy of them."""
    return [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]


def restore(contents: list[tuple[Tensor, Tensor]]) -> None:
    """Write saved contents back into the buffers that differ from them."""
    with torch.no_grad():
        for buffer, content in contents:
            if not torch.equal(buffer, content):
                buffer.copy_(content)


def _refill(container: dict[str, Any], entries: dict[str, Any]) -> None:
    # By identity: comparing tensors by value is neither cheap nor a bool.
    if [(key, id(value)) for key, value in container.items()] != [(key, id(value)) for key, value in entries.items()]:
        container.clear()
        container.update(entries)


def _containers(config: Any) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in config.__dict__.items() if isinstance(value, (dict, list))}


def _configs(modules: list[nn.Module]) -> list[Any]:
    waiting = [module.__dict__["config"] for module in modules if "config" in module.__dict__]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if hasattr(config, "to_dict") and id(config) not in found:
            found[id(config)] = config
            waiting += vars(config).values()  # a composite model's parts have their own
    return list(found.values())
