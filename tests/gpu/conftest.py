"""What tests on a CUDA device have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing has written is NaN."""
    deterministic: Any = torch.utils.deterministic
    before = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    yield
    deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
