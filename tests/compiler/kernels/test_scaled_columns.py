"""Columns times numbers, rounded once."""

from __future__ import annotations

import torch

from surgery.compiler.kernels.scaled_columns import scaled_columns


def test_a_factor_near_one_is_not_rounded_to_the_activation_s_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(64, 5, 33, generator=generator).to(torch.bfloat16)
    scales = 1 + 4e-3 * torch.rand(33, generator=generator)
    found = scaled_columns(y, scales)
    exact = y.double() * scales.double()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0)
    assert not torch.equal(found, y * scales.to(torch.bfloat16))


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    scales = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scaled_columns, (y, scales))
