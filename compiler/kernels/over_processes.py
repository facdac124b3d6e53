"""Sums over the processes of a run (`torch.distributed`): what makes the step of several the step of one.

Each process computes the gradients of its rows, already divided by the labels of all; their sum is then the gradient
of the whole batch. Only what is trained is sent, in one message per dtype. Where there is one process nothing is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def several() -> bool:
    """Whether the run has more than one process."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def over_processes(value: Tensor) -> Tensor:
    """A number, 0-d, summed over all processes; as it is where there is one."""
    if several():
        distributed.all_reduce(value)
    return value


@torch.no_grad()
def step_over_processes(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """The loss, 0-d, and in place the gradients of all that `optimizer` trains, summed over all processes.

    A process that had no rows has no gradients yet: it takes part with zeros, and leaves out what nobody has one of,
    as the others do. Parameters that some process has a gradient of have one on all others that had rows.
    """
    if not several():
        return loss
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    known = [parameter.grad is not None for parameter in trained]
    counts = torch.tensor([0.0, *map(float, known)], dtype=torch.float64).to(loss.device, non_blocking=True)
    counts[0] = loss
    distributed.all_reduce(counts)
    if not any(known):
        for parameter, count in zip(trained, counts[1:].tolist(), strict=True):
            parameter.grad = torch.zeros_like(parameter) if count else None
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        message = torch.cat([gradient.reshape(-1) for gradient in alike])
        distributed.all_reduce(message)
        sums = torch.split(message, [gradient.numel() for gradient in alike])
        torch._foreach_copy_(alike, [one.view(gradient.shape) for one, gradient in zip(sums, alike, strict=True)])
    return counts[0].to(loss.dtype)


def rounds_of_others(rounds: int) -> int:
    """How many more rounds of something than this process another one takes, at the most."""
    if not several():
        return 0
    most = torch.tensor(rounds)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return int(most) - rounds


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is spread over the processes by its rows, axis 0: a `DTensor`, as FSDP2 stores a weight."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds: its memory, not a copy. All of one that is not spread."""
    found: Tensor = tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]
    return found


def rows(tensor: Tensor, process: int) -> slice:
    """The rows of a spread tensor that a process holds: as many for each, fewer or none for the last ones."""
    size, each = tensor.shape[0], -(-tensor.shape[0] // distributed.get_world_size())
    return slice(min(process * each, size), min((process + 1) * each, size))


def of_own_rows(
    targets: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor], transposed: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Factors of `left @ right` cut to the rows of each target that this process holds, as views.

    Of a stack of matrices, whose axis 0 counts them, both factors are cut; of a matrix stored `transposed` the right.
    """
    found = []
    for target, left, right in zip(targets, lefts, rights, strict=True):
        own = rows(target, distributed.get_rank()) if is_spread(target) else slice(None)
        if target.dim() > 2:
            found.append((left[own] if left.dim() > 2 else left, right[own] if right.dim() > 2 else right))
        else:
            found.append((left, right[:, own]) if transposed else (left[own], right))
    return [left for left, _ in found], [right for _, right in found]
