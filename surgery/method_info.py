"""What is known of every method of the library: its text, its tensors, and what the compiler proves of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.compiler import nodes

if TYPE_CHECKING:
    from surgery.compiler.algebra.build import Value
    from surgery.compiler.algebra.measured import Gain

SIZE = 4096  # rows and columns of the Linear at which methods are compared, the only site of its rule
HEADS = 32
REFERENCE = {
    "in": SIZE, "out": SIZE, "max_in": SIZE, "max_out": SIZE, "heads": HEADS, "max_heads": HEADS,
    "head_dim": SIZE // HEADS, "layer": 0, "layers": 1, "slot": 0, "slots": 1, "site": 0, "sites": 1, "earlier": 0,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a method: its start as it is spelt, and how many numbers it has at the reference Linear."""

    name: str
    role: str
    start: str
    shared: str  # "model", "kind", "model as NAME", or nothing
    numbers: int


@dataclass(frozen=True)
class MethodInfo:
    """A method of the library with what is proved of it; `rank_bound` is a text such as "rank", None if full."""

    name: str
    parameters: tuple[str, ...]
    equation: str
    source: str
    text: str
    identity_at_start: bool
    rank_bound: str | None
    merges: bool
    exports_as_lora: bool
    keeps_zeros: bool
    moves_base: bool
    needs_dense_weight: bool
    needs_calibration: bool
    merge_reason: str = ""  # why it does not merge
    open_reason: str | None = None  # why the steps that move W have no sum in closed form; empty: they have one
    tensors: tuple[TensorInfo, ...] = ()

    @property
    def title(self) -> str:
        """The method's own name: what its header says before the colon."""
        return self.source.partition(": ")[0]

    @property
    def what(self) -> str:
        """One sentence about it, from its header."""
        return self.source.partition(": ")[2].partition(". ")[0]

    @property
    def trained(self) -> int:
        """Numbers that it trains with its defaults at one Linear of 4096 x 4096; what the data tell is 1."""
        return sum(tensor.numbers for tensor in self.tensors if tensor.role == "train")


def methods() -> list[MethodInfo]:
    """Every method of the library, in the order of the names."""
    from surgery.compiler.library import library

    return [_info(node) for node in library().values()]


def _info(node: nodes.Method) -> MethodInfo:
    from surgery.compiler.algebra.arguments import bind_arguments
    from surgery.compiler.algebra.method import elaborate
    from surgery.compiler.algebra.proved import prove
    from surgery.compiler.algebra.quantity import Quantity
    from surgery.compiler.algebra.telescope import why_not
    from surgery.compiler.p2_check import SYMBOLIC
    from surgery.compiler.printer import show

    sizes = {size: Quantity.symbol(size) for size in SYMBOLIC}
    formula, problems = elaborate(node, bind_arguments(node, None), sizes)
    problems.raise_errors()
    assert formula is not None
    facts = prove(formula)
    return MethodInfo(
        name=node.name,
        parameters=tuple(show(parameter) for parameter in node.parameters),
        equation="; ".join(show(statement) for statement in node.statements if _computes(statement)),
        source=" ".join(line.lstrip("# ") for line in node.comments if line),
        text=show(nodes.Tree((node,))),
        open_reason=(why_not(formula) or "") if formula.moves_base else None,
        tensors=_tensors(node),
        **{
            **vars(facts),
            "rank_bound": None if facts.rank_bound is None else str(facts.rank_bound),
            "needs_calibration": facts.needs_calibration or _defaults(node)[1],
        },
    )


def _computes(statement: nodes.Statement) -> bool:
    """Whether a statement belongs to the equation: names and results do, tensors and a mere dropout do not."""
    if isinstance(statement, nodes.Bind):
        value = statement.value
        return statement.name != "input" or not isinstance(value, nodes.Call) or value.function != "dropout"
    return isinstance(statement, nodes.Event)


def _defaults(node: nodes.Method) -> tuple[dict[str, Value], bool]:
    """The parameters' default values, a number of the data as 1, and whether there is such a number."""
    from surgery.compiler.algebra.arguments import bind_arguments
    from surgery.compiler.algebra.quantity import Quantity

    asked: list[Gain] = []

    def least(gain: Gain) -> Quantity:
        asked.append(gain)
        return Quantity.of(1)

    given = [  # a text has no default where it names a checkpoint: any does
        nodes.Argument(nodes.String(parameter.name), parameter.name)
        for parameter in node.parameters
        if parameter.default is None
    ]
    return bind_arguments(node, nodes.Call(node.name, tuple(given)), least), bool(asked)


def _tensors(node: nodes.Method) -> tuple[TensorInfo, ...]:
    from surgery.compiler.algebra.method import elaborate
    from surgery.compiler.algebra.quantity import Quantity
    from surgery.compiler.p2_check import SYMBOLIC
    from surgery.compiler.printer import show

    formula, problems = elaborate(node, _defaults(node)[0], {name: Quantity.of(REFERENCE[name]) for name in SYMBOLIC})
    problems.raise_errors()
    assert formula is not None
    shapes = {tensor.name: tensor.shape for tensor in formula.tensors}
    return tuple(
        TensorInfo(
            statement.name, statement.role, show(statement.start),
            " as ".join(part for part in (statement.shared_by, statement.shared_as) if part),
            math.prod(size.whole or 0 for size in shapes[statement.name]),
        )
        for statement in node.statements
        if isinstance(statement, nodes.Tensor)
    )  # fmt: skip
