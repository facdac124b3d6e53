"""Optimizers that torch does not have, one file each; none is needed yet."""
