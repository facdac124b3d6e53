"""Optimizers that torch does not have, one file each: they train bfloat16 tensors without losing small updates."""
