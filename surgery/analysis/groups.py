"""Groups of weights that are multiplied with one another: the bound of a rank, and adapters that reach it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from surgery.analysis.chains import adapted, construct, cut, difference, distance, product, spectral_norm
from surgery.analysis.checkpoint import Checkpoint
from surgery.analysis.rows import Row, Wanted, row_of
from surgery.analysis.spectra import Pair, arithmetic, decomposed, rounding, singular_values, truncated
from surgery.analysis.weights import Group, Matrix
from surgery.compiler.diagnostics import fail


def measure_group(
    group: Group, wanted: Wanted, device: torch.device, heads: int | None = None
) -> tuple[Row, dict[str, Pair]]:
    """The row of a group, and the adapters that reach what it says, by the names of the base's weights, on the CPU.

    With `heads` the two weights of a group are cut into heads, each of which multiplies its own parts; the row is of
    the head that needs most. Raises SURG005 for weights that do not fit one another.
    """
    weights = [matrix.read().to(device) for matrix in group.base]
    targets = [matrix.read().to(device) for matrix in group.target]
    own, wished = (_parts(group, matrices, heads) for matrices in (weights, targets))
    alike = [weight.shape for weight in weights] == [target.shape for target in targets]
    if (own[0].shape[-1], own[-1].shape[-2]) != (wished[0].shape[-1], wished[-1].shape[-2]) or (heads and not alike):
        message = f"the product in the base is {_sizes(own)}, that in the target {_sizes(wished)}"
        raise fail("SURG005", message, group.product.span)
    values = singular_values(difference(own, wished))
    size = math.prod(map(spectral_norm, own))
    shape = (*own[0].shape[:-2], own[-1].shape[-2], own[0].shape[-1])
    noise = _noise(group.target, wished) + arithmetic(values, shape, size)
    before = singular_values(difference([torch.zeros_like(part) for part in own], own))
    row = row_of(group.name, shape, values, float(before.norm()), noise, wanted, len(weights))
    best: list[Pair] = []
    if not heads:
        best = construct(weights, product(targets), row.chosen)
        row = replace(row, reached=distance(adapted(weights, best), wished, wanted.norm))
    if alike and (heads or not row.attained):  # without inverses the changes of the weights themselves may be nearer
        changes = [target - weight for weight, target in zip(weights, targets, strict=True)]
        alone = [truncated(decomposed(change), row.chosen) for change in changes]
        reached = distance(_parts(group, adapted(weights, alone), heads), wished, wanted.norm)
        if row.reached is None or reached < row.reached:
            row, best = replace(row, reached=reached), alone
    return row, _named(group, best)


def heads_of(base: Checkpoint) -> int:
    """How many heads the attention of a model has; SURG074 where its config does not say it."""
    config = base.skeleton and base.skeleton.config
    heads = config and getattr(config.get_text_config(), "num_attention_heads", None)
    if not isinstance(heads, int):
        message = f'how many heads "{base.name}" has cannot be told from its config'
        raise fail("SURG074", message, help="leave out --per-head: then the whole weights are multiplied")
    return heads


def _parts(group: Group, matrices: Sequence[Tensor], heads: int | None) -> list[Tensor]:
    """The weights as they are multiplied, `[..., out, in]`."""
    span = group.product.span
    if heads is None:
        for first, second in zip(matrices, matrices[1:], strict=False):
            if second.shape[1] != first.shape[0]:
                message = f"{list(second.shape)} @ {list(first.shape)} do not fit in `{group.name}`"
                help = "what is applied last comes first, as in `B @ A`; `.T` transposes; --per-head goes by heads"
                raise fail("SURG005", message, span, help=help)
        return list(matrices)
    if len(matrices) != 2:
        message = f"heads are between two weights, and `{group.name}` has {len(matrices)}"
        raise fail("SURG005", message, span, help="leave out --per-head, or name two")
    parts = cut(matrices[0], matrices[1], heads)
    if parts is None:
        sizes = f"{list(matrices[1].shape)} @ {list(matrices[0].shape)}"
        raise fail("SURG005", f"{sizes} in `{group.name}` do not share their inner side among {heads} heads", span)
    return list(parts)


def _sizes(parts: Sequence[Tensor]) -> str:
    return f"{parts[-1].shape[-2]} x {parts[0].shape[-1]}"


def _named(group: Group, adapters: Sequence[Pair]) -> dict[str, Pair]:
    """Adapters of the weights as the base has them; the last of a group may have nothing to do."""
    found: dict[str, Pair] = {}
    for matrix, (left, right) in zip(group.base, adapters, strict=True):
        pair = (right.mT, left.mT) if matrix.factor.transposed else (left, right)
        if left.shape[1]:
            found[matrix.factor.name] = (pair[0].cpu(), pair[1].cpu())
    return found


def _noise(matrices: Sequence[Matrix], targets: Sequence[Tensor]) -> float:
    """What rounding each weight of the target adds to their product, to first order."""
    sizes = [spectral_norm(target) for target in targets]
    found = 0.0
    for number, (matrix, target) in enumerate(zip(matrices, targets, strict=True)):
        if matrix.rounded is not None:
            others = [size for place, size in enumerate(sizes) if place != number]
            found += rounding(target, matrix.rounded) * math.prod(others)
    return found
