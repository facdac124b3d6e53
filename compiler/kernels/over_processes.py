"""Sums over the processes of a run (`torch.distributed`): what makes the step of several the step of one.

Each process computes the gradients of its rows, already divided by the labels of all; their sum is then the gradient
of the whole batch. Only what is trained is sent, in one message per dtype. Where there is one process nothing is done.
"""

from __future__ import annotations

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
