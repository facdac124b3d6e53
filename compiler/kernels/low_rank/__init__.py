"""Frozen linears with low-rank changes that read one input: one operation with a backward of its own."""

from surgery.compiler.kernels.low_rank.operator import low_rank_linear
from surgery.compiler.kernels.low_rank.reference import low_rank_linear_reference

__all__ = ["low_rank_linear", "low_rank_linear_reference"]
