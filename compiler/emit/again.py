"""Blocks whose forward the backward runs again: which they are, and whether a second run gives what the first gave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from surgery.compiler.algebra.recompute import Recomputed
from surgery.compiler.diagnostics import fail
from surgery.compiler.emit.loops import Checkpoint
from surgery.compiler.emit.outline import Block, Item, draws_by_name, module_path
from surgery.compiler.graph import tensors
from surgery.compiler.plan import Plan
from surgery.compiler.span import Span
from surgery.runtime.ownership import written_by


@dataclass(frozen=True)
class Again:
    """The `paths` of such blocks, where the spec says so, and what step.py says of them."""

    paths: frozenset[str]
    span: Span | None
    comment: str

    @classmethod
    def of(cls, plan: Plan) -> Again | None:
        """As the plan has them; None where it has none."""
        if not plan.recomputed:
            return None
        place = plan.step.recompute.place
        where = f"{Path(place.file).name}:{place.line} " if place else ""
        comment = f"{where}the backward runs these blocks again, from their inputs"
        return cls(frozenset(plan.recomputed), plan.span(place) if place else None, comment)

    @property
    def stacks(self) -> frozenset[str]:
        """The lists that the blocks are of."""
        return frozenset(path.rpartition(".")[0] for path in self.paths)

    @property
    def around(self) -> frozenset[str]:
        """Lists further out, whose own entries are then no functions."""
        found = set()
        for stack in self.stacks:
            parts = stack.split(".")
            found |= {".".join(parts[:end]) for end in range(1, len(parts)) if parts[end].isdecimal()}
        return frozenset(found)

    def call(self, block: Block) -> Checkpoint | None:
        """How a block is called, if it is one of them."""
        return Checkpoint(_draws(block.nodes), self.comment) if block.path in self.paths else None

    def check(self, module: fx.GraphModule, items: Sequence[Item]) -> None:
        """SURG038 for a block that is no function of its own, and for one that writes what it reads."""
        blocks = {item.path: item for item in items if isinstance(item, Block)}
        named = tensors(module)
        for path in sorted(self.paths):
            if path in blocks:
                if written := _state(blocks[path], named):
                    self._refuse(f"`{path}` writes `{written}`: run again, it would give something else")
            elif any(f"{module_path(node)}.".startswith(f"{path}.") for node in module.graph.nodes):
                self._refuse(f"what `{path}` computes is mixed with other blocks of its list")

    def _refuse(self, reason: str) -> None:
        raise fail("SURG038", f"a block cannot be run again: {reason}", self.span, help="leave `recompute` out")


def _draws(nodes: Iterable[fx.Node]) -> bool:
    """Whether random numbers are drawn while training."""
    return any(_draws_itself(node) for node in _all(nodes))


def _draws_itself(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return draws_by_name(node.target)
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    rate = given.get("dropout_p", given.get("p", 0.0 if "dropout_p" in names else None))
    return not (isinstance(rate, float | int) and rate == 0)


def _all(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """The nodes, and those of functions that they call."""
    for node in nodes:
        yield node
        owner = node.graph.owning_module
        called = owner.get_submodule(str(node.target)) if node.op == "call_module" and owner is not None else None
        if isinstance(called, Recomputed):
            yield from called.function.graph.nodes


def _state(block: Block, named: dict[str, torch.Tensor]) -> str | None:
    """A tensor of the model that the block writes and its results may depend on.

    A batch norm's statistics are not such a one: while it writes them it reads its input's.
    """
    for node in block.nodes:
        for target in written_by(node):
            counts = target.op == "get_attr" and not named[str(target.target)].is_floating_point()
            if target.op == "get_attr" and not counts and "batch_norm" not in str(node.target):
                return str(target.target)
    return None
