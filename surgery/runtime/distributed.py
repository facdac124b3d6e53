"""The processes of a run: how they find each other, agree, and share the work.

A launcher (`torchrun`, `accelerate launch`) says by its environment how many there are; without one there is one, and
nothing here does anything. Small things go over the CPU, tensors of a GPU from GPU to GPU.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TypeVar

import torch
from torch import Tensor, distributed

from surgery.compiler.kernels.over_processes import is_spread, several
from surgery.runtime.devices import why_not

Value = TypeVar("Value")
_INTERRUPTED = 130  # the exit status of a run that all processes have ended together
_PATIENCE = 10.0  # seconds in which a launcher ends all processes after one has failed


@contextmanager
def joined(device: str | None = None) -> Iterator[None]:
    """Inside, the processes that a launcher started are one group; its default device is this process's own GPU.

    On the `device` "cpu" no GPU is touched, and there may be more processes than GPUs.
    """
    if launched() == 1 or (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available() and device != "cpu":
        if why_not(local_device()) is None:  # who asks for a GPU that is not there says so, once there is a group
            torch.cuda.set_device(local_device())
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend)
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@contextmanager
def heard_once() -> Iterator[None]:
    """Inside, only the first process writes to the terminal; another one does when it alone fails.

    What all find wrong all say at the same time: the launcher has ended the others by the time that they would.
    """
    if number() == 0:
        yield
        return
    said = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            yield
    except BaseException as error:
        if getattr(error, "exit_code", 1) != _INTERRUPTED:
            time.sleep(_PATIENCE)
            print(f"process {number()}:\n{said.getvalue()}", file=sys.stderr)
        raise


def launched() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_device() -> str:
    """The GPU of this process among those of its machine, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def number() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if several() else 0


def processes() -> int:
    """How many processes the run has."""
    return distributed.get_world_size() if several() else 1


def anywhere(found: bool) -> bool:
    """Whether something holds in any of the processes; all of them ask."""
    if not several():
        return found
    flag = torch.tensor(int(found))
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag)


def gathered(value: Value) -> list[Value]:
    """What each process gives, in their order; all of them ask. Anything that Python can pickle."""
    if not several():
        return [value]
    found: list[Value] = [value] * processes()
    distributed.all_gather_object(found, value)
    return found


def wait() -> None:
    """Until all processes are here."""
    if several():
        anywhere(False)


@torch.no_grad()
def alike(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values, in place: starts that a GPU computes may differ in the last bit."""
    if several():
        for tensor in tensors:
            if is_spread(tensor):
                continue
            whole = tensor.detach().contiguous()
            distributed.broadcast(whole, 0)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)


def seed_step(seed: int, step: int, *, own: bool) -> None:
    """Seed torch's generators for a part of a step, by its number: `own` for each process (dropout), or for all alike.

    So nothing of generators has to be saved, and a run may go on with another number of processes. One process keeps
    its one sequence of random numbers, as ever.
    """
    if several():
        digest = hashlib.sha256(f"surgery step {seed} {step} {number() if own else 'all'}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
