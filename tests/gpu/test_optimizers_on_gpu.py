"""Optimizers that round, on a CUDA device: the tests of tests/surgery/test_optimizers.py; run by `make gpu`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _tests() -> Any:
    path = Path(__file__).resolve().parent.parent / "surgery" / "test_optimizers.py"
    spec = importlib.util.spec_from_file_location("surgery_tests_optimizers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TESTS = _tests()
OWN = (TESTS.RoundingAdamW, TESTS.RoundingSGD)


def test_the_mean_of_many_roundings_is_the_number() -> None:
    TESTS.test_the_mean_of_many_roundings_is_the_number("cuda")


def test_what_bfloat16_holds_is_left_as_it_is() -> None:
    TESTS.test_what_bfloat16_holds_is_left_as_it_is("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pair", TESTS.PAIRS)
def test_wide_parameters_get_the_numbers_of_torch(pair: Any, dtype: torch.dtype, monkeypatch: Any) -> None:
    TESTS.test_wide_parameters_get_the_numbers_of_torch(*pair, dtype, "cuda", monkeypatch)


@pytest.mark.parametrize("kind", OWN)
def test_small_steps_arrive_where_plain_bfloat16_stalls(kind: Any) -> None:
    torchs = {TESTS.RoundingAdamW: torch.optim.AdamW, TESTS.RoundingSGD: torch.optim.SGD}[kind]
    TESTS.test_small_steps_arrive_where_plain_bfloat16_stalls(kind, torchs, {}, 1e-4, "cuda")


@pytest.mark.parametrize("kind", OWN)
def test_a_resumed_run_is_the_same_to_the_bit(kind: Any) -> None:
    options = TESTS.ADAMW if kind is TESTS.RoundingAdamW else TESTS.SGD
    TESTS.test_a_resumed_run_is_the_same_to_the_bit(kind, options, "cuda")


@pytest.mark.parametrize("kind", OWN)
def test_a_step_waits_for_nothing(kind: Any) -> None:
    of = TESTS.parameters(torch.bfloat16, "cuda")
    optimizer = kind(of, lr=1e-3, **(TESTS.SGD if kind is TESTS.RoundingSGD else {}))
    for number in range(2):
        TESTS.set_gradients(of, number)
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
