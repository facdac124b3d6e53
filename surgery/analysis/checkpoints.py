"""Two checkpoints, of which the weights are matched by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.analysis.checkpoint import Checkpoint, as_matrix, matrix_shape, why_no_matrix
from surgery.analysis.products import Factor, natural
from surgery.analysis.weights import LeftOut, Matrix, Pairs, Weight, check_factor, listed, turned
from surgery.compiler.diagnostics import Note, fail

ALONE = {"base": "it is in the base alone", "target": "it is in the target alone"}


@dataclass(frozen=True)
class Entry:
    """A weight by its name, and the tensors that hold it; None where a side has none."""

    name: str
    base: str | None
    target: str | None


class Checkpoints:
    """A base and a target; a weight has the name that the base gives it."""

    def __init__(self, base: Checkpoint, target: Checkpoint) -> None:
        self.base, self.target = base, target
        self.base_names, self.target_names = list(base.names), list(target.names)
        self.entries = {entry.name: entry for entry in _entries(base, target)}
        self.uses = Counter(entry.base for entry in self.entries.values())

    @property
    def names(self) -> Iterable[str]:
        """Of all weights that one of them has."""
        return self.entries

    def fill(self, pairs: Pairs, names: Iterable[str]) -> None:
        """Pair the weights of these names. Raises SURG074 where they are not of one architecture."""
        unlike: list[str] = []
        lacking: list[str] = []
        for name in names:
            entry = self.entries[name]
            if entry.base is None or entry.target is None:
                alone = ALONE["base" if entry.target is None else "target"]
                if any(part.isdigit() for part in name.split(".")):
                    lacking.append(f"`{name}`: {alone}")
                pairs.left_out.append(LeftOut(name, alone))
                continue
            base, target = self.base.stored[entry.base], self.target.stored[entry.target]
            if base.shape != target.shape:
                unlike.append(f"`{name}`: {list(base.shape)} and {list(target.shape)}")
                continue
            layout = self.base.layout(name) or self.target.layout(entry.target)
            reason = why_no_matrix(base, layout) or why_no_matrix(target, layout)
            if reason is not None:
                tensors = self.base.tensor(entry.base), self.target.tensor(entry.target)
                pairs.left_out.append(LeftOut(name, reason, not torch.equal(*tensors)))
                continue
            if name not in self.base.stored:
                pairs.found.warn("SURG075", f"`{name}` is tied to `{entry.base}` in the base: it is compared with that")
            pairs.weights.append(self._pair(name, entry.base, entry.target))
        self._refuse(unlike, "have another shape in the other")
        self._refuse(lacking, "are in blocks that the other has not")
        self._warn(pairs)

    def _refuse(self, names: Sequence[str], what: str) -> None:
        if names:
            models = f'"{self.base.name}" and "{self.target.name}"'
            help = "leave them out: --except PATTERN; or say which products of weights belong together: --group"
            message = f"{models} are not of one architecture: {len(names)} weights {what}"
            raise fail("SURG074", message, notes=[Note(listed(names))], help=help)

    def _warn(self, pairs: Pairs) -> None:
        """Say what only one side has, and where rounding is taken for noise."""
        for side, reason in ALONE.items():
            if alone := [f"`{left.name}`" for left in pairs.left_out if left.reason == reason]:
                pairs.found.warn("SURG075", f"only the {side} has {listed(alone)}")
        kinds: dict[tuple[str, str], int] = {}
        for weight in pairs.weights:
            entry = self.entries[weight.name]
            assert entry.base is not None and entry.target is not None
            kind = self.base.stored[entry.base].dtype, self.target.stored[entry.target].dtype
            kinds[kind] = kinds.get(kind, 0) + 1
        for (base, target), count in kinds.items():
            if base != target:
                message = f"{count} weights are stored as {base} in the base and as {target} in the target"
                pairs.found.warn("SURG075", f"{message}: what rounding to the coarser one changed counts as noise")

    def _pair(self, name: str, base: str, target: str) -> Weight:
        layout = self.base.layout(name) or self.target.layout(target)
        coarser = max(self.base.dtype(base), self.target.dtype(target), key=lambda dtype: torch.finfo(dtype).eps)

        def own() -> Tensor:
            return as_matrix(self.base.tensor(base), layout)

        def change() -> Tensor:
            return as_matrix(self.target.tensor(target), layout) - own()

        shape = matrix_shape(self.base.stored[base], layout)
        return Weight(name, shape, own, change, coarser, untied=self.uses[base] > 1)

    def of_base(self, factor: Factor) -> Matrix:
        """A weight of the base in a product."""
        return factor_of(self.base, factor)

    def of_target(self, factor: Factor) -> Matrix:
        """A weight of the target in a product."""
        return factor_of(self.target, factor)


def factor_of(model: Checkpoint, factor: Factor) -> Matrix:
    """A weight of a checkpoint in a product. Raises SURG074 where it is no matrix."""
    key = model.names[factor.name]
    layout, stored = model.layout(key), model.stored[key]
    reason = why_no_matrix(stored, layout)
    check_factor(factor, reason, 2 if reason else len(matrix_shape(stored, layout)))
    return Matrix(factor, turned(lambda: as_matrix(model.tensor(key), layout), factor), model.dtype(key))


def _entries(base: Checkpoint, target: Checkpoint) -> list[Entry]:
    """The weights that either stores, in the order of the blocks; one under several names is there once."""
    prefixes = _prefixes(base.stored, target.stored)
    sides = [
        {name.removeprefix(prefix): name for name in model.names}
        for model, prefix in zip((base, target), prefixes, strict=True)
    ]
    found: dict[tuple[str | None, str | None], Entry] = {}
    # a weight with several names has the one under which the base stores it
    for short in sorted({*sides[0], *sides[1]}, key=lambda short: sides[0].get(short) not in base.stored):
        names = [side.get(short) for side in sides]
        if not any(name in model.stored for name, model in zip(names, (base, target), strict=True)):
            continue
        keys = names[0] and base.names[names[0]], names[1] and target.names[names[1]]
        found.setdefault(keys, Entry(names[0] or names[1] or short, *keys))
    return sorted(found.values(), key=lambda entry: natural(entry.name))


def _prefixes(base: Mapping[str, object], target: Mapping[str, object]) -> tuple[str, str]:
    """What to take off the names of each side: the prefix of the base model, where one side alone has it."""
    firsts = [
        [f"{first}." for first in dict.fromkeys(name.partition(".")[0] for name in side)] for side in (base, target)
    ]
    choices = [("", ""), *((first, "") for first in firsts[0]), *(("", first) for first in firsts[1])]

    def common(choice: tuple[str, str]) -> int:
        one, other = choice
        return len({name.removeprefix(one) for name in base} & {name.removeprefix(other) for name in target})

    return max(choices, key=common)
