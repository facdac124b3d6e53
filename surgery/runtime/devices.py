"""Which devices a command may be told to use."""

from __future__ import annotations

import torch

from surgery.compiler.diagnostics import fail


def device_of(device: str | torch.device) -> torch.device:
    """The device of a name, with its index; raises SURG004 where there is none."""
    if reason := why_not(str(device)):
        raise fail("SURG004", reason)
    return torch.empty(0, device=device).device  # "cuda" to "cuda:0"


def why_not(device: str) -> str | None:
    """Why no tensor can be put on a device of this name here, with the names of those that there are; else None."""
    try:
        if torch.device(device).type != "meta":  # which holds no numbers
            torch.empty(0, device=device)
            return None
    except (RuntimeError, AssertionError, NotImplementedError):  # torch's ways to say that it does not know or have one
        pass
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return f"`{device}` is no device of this machine; here: {', '.join(here)}"
