"""A weight that is W and an update of low rank, entry by entry under W: what `kernels/updated_weight.py` makes in one
pass, found by algebra."""

from __future__ import annotations

from dataclasses import dataclass, replace

from surgery.compiler.algebra.evaluate import Evaluator
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.facts import is_scalar
from surgery.compiler.algebra.narrow import narrow, summands, total
from surgery.compiler.algebra.recorder import called
from surgery.compiler.algebra.structures import Tensor
from surgery.compiler.kernels.updated_weight import updated_weight


@dataclass(frozen=True)
class Updated:
    """`W + scale * times(W) * (left @ right)`; `times` is "one", "mask" or "weight"."""

    left: Expression
    right: Expression
    scale: float
    times: str


def updated(weight: Expression) -> Updated | None:
    """The parts of a weight `[out, in]` of that form, None for any other."""
    parts = summands(weight)
    changes = [_under(part) for part in parts if part.operation != "weight"]
    if len(changes) != len(parts) - 1 or len({times for times, _ in changes}) != 1:
        return None
    found = narrow(total([change for _, change in changes]))
    if found is None or found.rest:
        return None
    return Updated(found.left, found.right, found.scale, changes[0][0])


def built(parts: Updated, evaluator: Evaluator) -> Tensor:
    """The weight, in one pass over W; factors that are stored tensors are read as they are stored."""
    left, right = map(evaluator.operand, (parts.left, parts.right))
    return called(updated_weight, evaluator.weight(), left, right, parts.scale, parts.times)


def _under(node: Expression) -> tuple[str, Expression]:
    """What a term takes of W entry by entry, and the rest of the term."""
    parts = node.arguments
    match node.operation:
        case "negate":
            times, inner = _under(parts[0])
            return times, replace(node, arguments=(inner,))
        case "multiply" | "divide" if parts[0].shape == node.shape and is_scalar(parts[1]):
            times, inner = _under(parts[0])
            return times, replace(node, arguments=(inner, parts[1]))
        case "multiply" if parts[1].shape == node.shape and is_scalar(parts[0]):
            times, inner = _under(parts[1])
            return times, replace(node, arguments=(parts[0], inner))
        case "multiply" if parts[0].shape == parts[1].shape:
            for by, inner in (parts, parts[::-1]):
                if by.operation == "weight":
                    return "weight", inner
                if by.operation == "mask" and by.arguments[0].operation == "weight":
                    return "mask", inner
    return "one", node
