"""What merging and exporting read of a training step alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from surgery.compiler.plan import Plan


class Adapted(Protocol):
    """A plan, the user's model, which the run has not changed, and by their names the tensors that it has."""

    @property
    def plan(self) -> Plan: ...  # noqa: D102

    @property
    def model(self) -> nn.Module: ...  # noqa: D102

    @property
    def weights(self) -> Mapping[str, Tensor]: ...  # noqa: D102
