"""Whether blocks of a list are alike: the same class and the same code, so that one capture is for all of them."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

Place = tuple[str, str]  # an attribute: the module's path inside its block, and the attribute's name

# What every module has; the rest of its `__dict__` is what its class gave it.
_OWN = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = tuple(name for name in _OWN if "hooks" in name and not name.endswith(("_with_kwargs", "_always_called")))
_PLAIN = (bool, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.memory_format)


def groups(model: nn.Module, least: int) -> Iterator[tuple[dict[str, nn.Module], set[Place]]]:
    """Blocks of one list that are alike, by path, at least so many, and the numbers in which they differ.

    A list inside a block is not looked at where the blocks around it are alike already.
    """
    paths: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        paths[id(module)] = paths.get(id(module), 0) + 1
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        inner = [(f"{path}.{name}" if path else name, part) for name, part in module.named_children()]
        if type(module) is nn.ModuleList and len(inner) >= least:
            taken: set[str] = set()
            for found, numbers in _alike(inner, paths):
                if len(found) >= least:
                    taken |= set(found)
                    yield found, numbers
            inner = [(name, part) for name, part in inner if name not in taken]
        waiting += inner


def _alike(blocks: list[tuple[str, nn.Module]], paths: dict[int, int]) -> list[tuple[dict[str, nn.Module], set[Place]]]:
    found: list[tuple[dict[str, nn.Module], set[Place]]] = []
    for path, block in blocks:
        if any(paths[id(part)] > 1 or is_changed(part) for part in block.modules()):
            continue  # a module with two paths, or one that somebody has changed
        for members, numbers in found:
            differing = differences(next(iter(members.values())), block)
            if differing is not None:
                members[path] = block
                numbers |= differing
                break
        else:
            found.append(({path: block}, set()))
    return found


def is_changed(module: nn.Module) -> bool:
    """Whether a module runs anything but its class's forward."""
    return "forward" in module.__dict__ or any(module.__dict__.get(name) for name in _HOOKS)


def differences(left: nn.Module, right: nn.Module) -> set[Place] | None:
    """The attributes that are whole numbers and differ; None if anything else does, but for the contents of tensors."""
    lefts, rights = dict(left.named_modules()), dict(right.named_modules())
    if list(lefts) != list(rights) or _tensors(left) != _tensors(right):
        return None
    numbers: set[Place] = set()
    for path, one in lefts.items():
        other = rights[path]
        ours, theirs = _attributes(one), _attributes(other)
        if type(one) is not type(other) or ours.keys() != theirs.keys():
            return None
        for name, value in ours.items():
            if type(value) is int and type(theirs[name]) is int:
                numbers |= {(path, name)} if value != theirs[name] else set()
            elif not _same(value, theirs[name]):
                return None
    return numbers


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _OWN}


def _tensors(block: nn.Module) -> list[tuple[Any, ...]]:
    """All that code could ask of its tensors but their contents, and which of them are one."""
    first: dict[int, str] = {}
    shown: list[tuple[Any, ...]] = []
    for part in block.modules():
        shown += [(name, value is None) for name, value in (part._parameters | part._buffers).items()]
        shown.append(tuple(sorted(part._non_persistent_buffers_set)))
    for name, value in [*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)]:
        same = first.setdefault(id(value), name)
        kind = (type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        shown.append((name, same, *kind))
    return shown


def _same(one: Any, other: Any) -> bool:
    """Whether code cannot tell two values of an attribute from one another."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, _PLAIN) or type(one) is int:
        return bool(one == other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(_same, one.values(), other.values()))
    if type(one) is functools.partial:
        return _same((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    if isinstance(one, (set, frozenset)):
        return bool(one == other) and all(isinstance(value, (*_PLAIN, int)) for value in one)
    return False


class Unread(BaseException):  # a model that catches every Exception must not go on
    """Raised where a block reads a number in which it differs from those that are to be like it."""


class Unreadable:
    """Stands for such a number: it may be handed on, and its type is known, but nothing else can be asked of it."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return int
        raise Unread


def _refuse(*_: Any) -> Any:
    raise Unread


# What Python looks up in the class, past `__getattribute__`.
_COMPARED = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__str__", "__repr__")
_USED = ("__format__", "__or__", "__ror__", "__call__", "__iter__", "__len__", "__getitem__", "__contains__")
for _name in {*dir(int), *_COMPARED, *_USED} - (set(dir(type)) - {*_COMPARED, *_USED}):
    setattr(Unreadable, _name, _refuse)


def immutable(value: Any) -> bool:
    """Whether a value among the arguments of a block is a constant that cannot be changed."""
    return isinstance(value, _PLAIN) or type(value) is int or isinstance(value, types.FunctionType)


def fields(block: nn.Module) -> dict[Place, Any]:
    """Every attribute of a block's modules, containers by what they hold, to see afterwards what a call has changed."""
    found: dict[Place, Any] = {}
    for path, part in block.named_modules():
        for name, value in part.__dict__.items():
            held: tuple[Any, ...] = ()
            if isinstance(value, dict):
                held = tuple((key, id(entry)) for key, entry in value.items())
            elif isinstance(value, (list, set)):
                held = tuple(map(id, value))
            found[path, name] = (id(value), held)
    return found
