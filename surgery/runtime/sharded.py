"""A model whose frozen weights are spread over the processes by rows (FSDP2), and its tensors as they are stored.

Every process holds its rows of each weight of the model, and all of what a method trains, which is small. A block is
whole on a process while its forward or backward runs there, and at no other time; so is each module outside of the
blocks. W in the sense of this file is a `DTensor` over axis 0 whose local part are the rows `rows(...)`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from surgery.compiler.blocks import stacks
from surgery.compiler.kernels.over_processes import is_spread, local, rows
from surgery.compiler.skeleton import Skeleton
from surgery.runtime.distributed import number, processes

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls dtypes."""


def shard(model: nn.Module, whole: set[nn.Parameter], device: torch.device) -> None:
    """Spread a model's parameters, except those in `whole`, over all processes, block by block, and put it on a device.

    What lies on the CPU, or in a file that is mapped, is read one block at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes(),))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": whole}
    for module in [*reversed(_gathered_alone(model, whole)), model]:  # what is inside comes first
        fully_shard(module, **options)
    with torch.no_grad():
        for parameter in whole:
            parameter.data = parameter.data.to(device)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)


def _gathered_alone(model: nn.Module, whole: set[nn.Parameter]) -> list[nn.Module]:
    """The modules whose weights are gathered apart from the rest, in their order: blocks, and modules beside them."""
    blocks = {path for stack in stacks(Skeleton(model)) for path in stack}
    uses, found = _uses(model), list[nn.Module]()
    inside: set[int] = set()
    for path, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter not in whole]
        if path in blocks:
            found.append(module)
            inside |= {id(part) for part in module.modules()}
        elif id(module) not in inside and own and all(uses[id(parameter)] == 1 for parameter in own):
            found.append(module)
    return [module for module in found if module is not model]


def pieces_of(model: nn.Module, whole: set[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters that are whole on a process at the same time, piece by piece; the first is whole all the time."""
    pieces = [list(module.parameters()) for module in _gathered_alone(model, whole)]
    known = {id(parameter) for piece in pieces for parameter in piece}
    return [[one for one in model.parameters() if id(one) not in known], *pieces]


def _uses(model: nn.Module) -> dict[int, int]:
    """In how many places each parameter is: one of a tied pair has to be gathered with the other."""
    found: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found[id(parameter)] = found.get(id(parameter), 0) + 1
    return found


def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded: only the process's own rows of it are read."""
    local(target).copy_(value[rows(target, number())] if is_spread(target) else value)


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Tensors as a safetensors file, piece by piece, of which sharded ones come from all processes.

    All call it and read it to its end; only the first one gets anything. No tensor is whole anywhere but in the file.
    """
    named = sorted(tensors.items())
    if number() == 0:
        yield _header(named)
    for _, tensor in named:
        if is_spread(tensor):
            yield from _gathered(tensor)
        elif number() == 0:
            yield _plain(tensor)


def _header(named: Iterable[tuple[str, Tensor]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in named:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the numbers behind it are aligned
    return len(text).to_bytes(8, "little") + text


def _gathered(tensor: Tensor) -> Iterator[memoryview]:
    own = local(tensor).detach()
    if number() > 0:
        if own.numel():
            distributed.send(_numbers(own), 0)
        return
    yield _plain(own)
    for process in range(1, processes()):
        there = rows(tensor, process)
        shape = (there.stop - there.start, *tensor.shape[1:])
        if there.stop > there.start:
            received = _numbers(torch.empty(shape, dtype=tensor.dtype))
            distributed.recv(received, process)
            yield received.numpy().data


def _plain(tensor: Tensor) -> memoryview:
    return _numbers(tensor.detach()).numpy().data


def _numbers(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in memory of the CPU, `[bytes]` uint8."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
