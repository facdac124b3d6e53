"""Operations with a backward of their own, each one file with its plain torch reference beside it.

Where an operation has a kernel in Triton too, that is a file of its own, `NAME_triton.py`, which is imported at its
first launch: torch for a CPU comes without Triton. `forms.py` says for which tensors kernels
are taken, and what all operations here have in common, under autocast and for weights that are not frozen after all.
"""
