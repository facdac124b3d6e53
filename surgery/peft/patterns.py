"""A list of paths as patterns that mean exactly these: `model.layers.[0..15].self_attn.{q_proj,v_proj}`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from surgery.compiler import nodes
from surgery.compiler.pattern import matches, parse_pattern

Grid = tuple[frozenset[str], ...]  # what stands at every component: all combinations are meant


def patterns_of(paths: Iterable[str], others: Sequence[str] | None = None) -> list[str]:
    """As few patterns as merging one component at a time gives, in the order of the paths.

    With `others`, all names of the model, an index that takes every block is spelt `*`.
    """
    known = list(dict.fromkeys(paths))
    grids: list[Grid] = [tuple(frozenset([part]) for part in path.split(".")) for path in known]
    for depth in reversed(range(max(map(len, grids), default=0))):
        alike: dict[tuple[int, Grid, Grid], frozenset[str]] = {}
        for grid in grids:
            if len(grid) <= depth:
                alike[len(grid), grid, ()] = frozenset()
                continue
            key = (len(grid), grid[:depth], grid[depth + 1 :])
            alike[key] = alike.get(key, frozenset()) | grid[depth]
        grids = [(*before, here, *after) if here else before for (_, before, after), here in alike.items()]
    return [_shortened(".".join(map(_component, grid)), math.prod(map(len, grid)), others) for grid in grids]


def _component(options: frozenset[str]) -> str:
    """One component: a name, a range of indices, or `{a,b}`."""
    texts = sorted(options)
    if all(option.isdigit() for option in options):
        numbers = sorted(map(int, options))
        if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
            return f"[{numbers[0]}..{numbers[-1]}]"
        texts = list(map(str, numbers))
    return texts[0] if len(texts) == 1 else f"{{{','.join(texts)}}}"


def _shortened(pattern: str, size: int, others: Sequence[str] | None) -> str:
    """With `*` for a range of indices, if that means no more of the model."""
    if others is None:
        return pattern
    parts = pattern.replace("..", "\0").split(".")
    for position, part in enumerate(parts):
        if not part.startswith("["):
            continue
        shorter = ".".join([*parts[:position], "*", *parts[position + 1 :]]).replace("\0", "..")
        found = parse_pattern(nodes.Pattern(shorter))
        if sum(matches(found, name) for name in others) == size:
            parts[position] = "*"
    return ".".join(parts).replace("\0", "..")
