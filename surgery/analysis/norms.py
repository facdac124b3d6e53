"""How a distance between matrices is measured; apart, so that the command line's help needs no torch."""

from enum import StrEnum


class Norm(StrEnum):
    """The largest singular value, or the root of the sum of the squares of all."""

    spectral = "spectral"
    frobenius = "frobenius"
