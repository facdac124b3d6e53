"""Checks of a batch before a step takes it: missing and unknown entries, padding and documents of causal models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from surgery.compiler.diagnostics import did_you_mean, fail
from surgery.compiler.kernels.over_processes import several

POSITIONS = "position_ids"


def check(batch: Mapping[str, Tensor], inputs: Sequence[str], labels: str | None, *, causal: bool) -> dict[str, Tensor]:
    """The entries that the step takes: the graph's `inputs`, and `labels` where there is to be a loss.

    A causal model captured without an `attention_mask` is exact for rows padded on the right, since no token sees what
    comes after it: such a mask is checked, labels under its zeros become -100, and it is dropped. One captured with
    `position_ids` takes rows of several documents, whose positions start over: the first token of each has no label,
    since what comes before it is another's. Left out, a row is one document. Raises SurgError: SURG043 for another
    mask, SURG044 for entries that are missing, unknown, no tensors or of another number of rows.
    """
    wanted = [*inputs, *([labels] if labels and labels not in inputs else [])]
    if not isinstance(batch, Mapping):
        message = f"a batch is a dict of tensors by name, not a {type(batch).__name__}"
        raise fail("SURG044", message, help=f"this step takes {_listed(wanted)}")
    given = dict(batch)
    mask = None
    if causal and "attention_mask" not in inputs:
        mask = given.pop("attention_mask", None)
    packed = causal and POSITIONS in inputs
    if packed and POSITIONS not in given and isinstance(given.get(inputs[0]), Tensor):
        tokens = given[inputs[0]]
        given[POSITIONS] = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
    for name in wanted:
        if name not in given:
            what = "labels" if name == labels and name not in inputs else f"the input `{name}`"
            raise fail("SURG044", f"the batch lacks {what}", help=f"this step takes {_listed(wanted)}")
    extra = [name for name in given if name not in wanted]
    if extra == ["labels"] and labels is None:
        extra = []
    if extra:
        help = did_you_mean(extra[0], wanted) or f"this step takes {_listed(wanted)}"
        raise fail("SURG044", f"the step does not take {_listed(extra)}", help=help)
    for name in wanted:
        if not isinstance(given[name], Tensor):
            raise fail("SURG044", f"`{name}` is a {type(given[name]).__name__}, not a tensor")
        empty = given[name].shape[:1] == (0,) and not several()  # one of several may have no rows
        if given[name].ndim == 0 or empty:
            raise fail("SURG044", f"`{name}` has no rows: its shape is {list(given[name].shape)}")
    rows = {name: given[name].shape[0] for name in wanted}
    if len(set(rows.values())) > 1:
        raise fail("SURG044", "the entries of the batch have different numbers of rows: " + _counts(rows))
    if mask is not None:
        _check_mask(mask, given[inputs[0]])
        if labels in given:
            given[str(labels)] = given[str(labels)].masked_fill(mask.to(given[str(labels)].device) == 0, -100)
    if packed:
        _check_positions(given[POSITIONS], given[inputs[0]])
        if labels in given:
            given[str(labels)] = _within_documents(given[str(labels)], given[POSITIONS])
    return {name: given[name] for name in wanted}


def _check_positions(positions: Tensor, tokens: Tensor) -> None:
    if positions.shape != tokens.shape[:2]:
        message = f"`{POSITIONS}` has shape {list(positions.shape)}, the tokens {list(tokens.shape)}"
        raise fail("SURG044", message, help="each token has a position, from 0 in its document")


def _within_documents(labels: Tensor, positions: Tensor) -> Tensor:
    """Labels that are predicted from their own document: -100 where positions do not go on by one."""
    begins = positions[:, 1:] != positions[:, :-1] + 1
    return torch.cat([labels[:, :1], labels[:, 1:].masked_fill(begins.to(labels.device), -100)], dim=1)


def _check_mask(mask: Tensor, tokens: Tensor) -> None:
    if mask.shape != tokens.shape[:2]:
        message = f"attention_mask has shape {list(mask.shape)}, the tokens {list(tokens.shape)}"
        raise fail("SURG044", message)
    real = mask != 0
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        row = int((real[:, 1:] & ~real[:, :-1]).any(1).nonzero()[0])
        where = "on the left" if not bool(real[row, 0]) else "between tokens"
        raise fail(
            "SURG043",
            f"row {row} of the batch is padded {where}; a causal model is trained without a mask, padded on the right",
            help='pad on the right: `tokenizer.padding_side = "right"`',
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _counts(rows: Mapping[str, int]) -> str:
    return ", ".join(f"`{name}` {count}" for name, count in rows.items())
