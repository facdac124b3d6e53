"""Fused operations, each one file with its plain torch reference beside it; none is needed yet."""
