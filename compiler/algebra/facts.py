"""What can be proved of an equation, by induction over the expression: its start, its zeros, what it reads of W."""

from __future__ import annotations

from surgery.compiler.algebra.expression import MARK, Expression
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.algebra.structures import STRUCTURES, is_structure

ONE = Quantity.of(1)


def is_scalar(expression: Expression) -> bool:
    """Whether a factor multiplies every entry alike: a number, or a shape of ones only."""
    return all(size == ONE for size in expression.shape)


def is_row(expression: Expression) -> bool:
    """`[n]` or `[1, n]`: times a matrix it scales columns."""
    shape = expression.shape
    return len(shape) == 1 or (len(shape) == 2 and shape[0] == ONE)


def is_column(expression: Expression) -> bool:
    """`[m, 1]`: times a matrix it scales rows."""
    return len(expression.shape) == 2 and expression.shape[1] == ONE


# --- the value at the start -------------------------------------------------------------------------------------------


def _begun(formula: MethodFormula) -> tuple[Expression | None, Expression]:
    """W after the events at the start (None: as it was), and the equation over it and the starts of the tensors.

    It is simplified by algebra that holds for any W.
    """
    starts = {tensor.name: tensor for tensor in formula.tensors}

    def replaced(node: Expression, base: Expression | None) -> Expression:
        if node.operation == "weight":
            return base or node
        if node.operation == "tensor":
            name, _, far = node.name.partition(MARK)
            if name not in starts or (far and starts[name].start.expression is not None):
                return node  # of another block: that site's own W, and what starts from it
            start = starts[name].start
            if start.expression is not None:
                return replaced(start.expression, None)  # tensors start from W as it was
            constant = {"zeros": Quantity.of(0), "ones": ONE}.get(start.name)
            if start.name == "constant":
                constant = start.arguments[0]
            if constant is not None and (start.name != "constant" or constant.constant is not None):
                return Expression("filled", (), node.shape, value=constant)
            if start.name == "eye" and node.shape[-1] == node.shape[-2]:
                return Expression("identity", (), node.shape)
            return node
        arguments = tuple(replaced(argument, base) for argument in node.arguments)
        return _simplify(Expression(node.operation, arguments, node.shape, node.name, node.value, node.index))

    base: Expression | None = None
    for change in formula.corrections:
        base = replaced(change.result, base)
    return base, replaced(formula.expression, base)


def _filled(node: Expression) -> Quantity | None:
    """The number that all entries equal, if they are known to."""
    return node.value if node.operation in ("filled", "number") else None


def _fill(node: Expression, value: Quantity) -> Expression:
    return Expression("filled" if node.shape else "number", (), node.shape, value=value)


def _simplify(node: Expression) -> Expression:
    zero = Quantity.of(0)
    parts = node.arguments
    values = [_filled(part) for part in parts]

    def whole(part: Expression) -> Expression | None:
        """A part may stand for the node only where broadcasting does not change its shape."""
        return part if part.shape == node.shape else None

    match node.operation:
        case "stop":
            return parts[0]
        case "surrogate":
            return parts[0]
        case "matmul" if zero in values:
            return _fill(node, zero)
        case "matmul" if parts[0].operation == "identity":
            return whole(parts[1]) or node
        case "matmul" if parts[1].operation == "identity":
            return whole(parts[0]) or node
        case "add" if values[1] == zero:
            return whole(parts[0]) or node
        case "add" if parts[0].operation == "subtract" and parts[0].arguments[1] == parts[1]:
            return whole(parts[0].arguments[0]) or node
        case "add" if values[0] == zero:
            return whole(parts[1]) or node
        case "subtract" if values[1] == zero:
            return whole(parts[0]) or node
        case "subtract" if parts[0] == parts[1]:
            return _fill(node, zero)
        case "multiply" if zero in values:
            return _fill(node, zero)
        case "multiply" if values[0] == ONE:
            return whole(parts[1]) or node
        case "multiply" if values[1] == ONE:
            return whole(parts[0]) or node
        case "divide" if values[0] == zero:
            return _fill(node, zero)
        case "divide" if values[1] == ONE:
            return whole(parts[0]) or node
        case "divide" if parts[0] == parts[1]:
            return _fill(node, ONE)
        case "negate" | "transpose" | "slice" | "previous" | "dropout" if values[0] == zero:
            return _fill(node, zero)
        case "transpose" if parts[0].operation == "transpose":
            return parts[0].arguments[0]
        case "transpose" if parts[0].operation in ("identity", "filled"):
            return Expression(parts[0].operation, (), node.shape, value=parts[0].value)
        case name if name in STRUCTURES and STRUCTURES[name].is_identity(*parts):
            return Expression("identity", (), node.shape)
        case name if name in STRUCTURES and STRUCTURES[name].is_zero([value == zero for value in values]):
            return _fill(node, zero)
    return node


def identity_at_start(formula: MethodFormula) -> bool:
    """Whether the adapted weight is W before training, for every W and every draw of the starts."""
    base, start = _begun(formula)
    if formula.form == "weight":
        return start.operation == "weight"
    if formula.form == "output":
        return base is None and start.operation == "y" and start.name == "y"
    if base is not None:
        left = dict[Expression, int]()
        for part in (base, start):
            _add_summands(part, 1, left)
        return [(term.operation, times) for term, times in left.items() if times] == [("weight", 1)]
    return _filled(start) == Quantity.of(0)


def _add_summands(node: Expression, sign: int, found: dict[Expression, int]) -> None:
    """Count how often each term occurs in a sum, negative where it is subtracted."""
    if node.operation in ("add", "subtract") and all(part.shape == node.shape for part in node.arguments):
        left, right = node.arguments
        _add_summands(left, sign, found)
        _add_summands(right, sign if node.operation == "add" else -sign, found)
    elif _filled(node) != Quantity.of(0):
        found[node] = found.get(node, 0) + sign


# --- zeros and dependence on W ----------------------------------------------------------------------------------------


def keeps_zeros(node: Expression) -> bool:
    """Whether the matrix is zero wherever W is, whatever the tensors hold."""
    parts = node.arguments
    match node.operation:
        case "weight":
            return True
        case "filled" | "number":
            return node.value == Quantity.of(0)
        case "multiply":
            return any(keeps_zeros(part) and part.shape == node.shape for part in parts)
        case "add" | "subtract":
            return all(keeps_zeros(part) and part.shape == node.shape for part in parts)
        case "divide" | "negate" | "previous":
            return keeps_zeros(parts[0]) and parts[0].shape == node.shape
        case "matmul":
            return any(keeps_zeros(part) and other.operation == "diag" for part, other in (parts, parts[::-1]))
        case name if name in STRUCTURES:
            return STRUCTURES[name].keeps_zeros([keeps_zeros(part) and part.shape == node.shape for part in parts])
    return False


def needs_dense_weight(node: Expression) -> bool:
    """Whether some part reads W other than through `x @ W.T`, so that a quantized base would not do."""
    return dense_reading(node) is not None


def dense_reading(node: Expression) -> Expression | None:
    """The innermost part that reads W other than through `x @ W.T`; None where there is none."""
    if node.operation == "weight" or not reads_weight(node):
        return None
    parts = node.arguments
    inner = next(filter(None, map(dense_reading, parts)), None)
    reading = [part for part in parts if reads_weight(part)]
    match node.operation:
        case "add" | "subtract" | "negate" | "sum_for":
            return inner
        case "matmul" if len(reading) == 1:
            return inner
        case "multiply" | "divide" if reading in ([parts[0]], [parts[1]]):
            scaled, by = parts if reading == [parts[0]] else parts[::-1]
            if is_scalar(by) and (node.operation == "multiply" or scaled is parts[0]):
                return inner
    return inner or node


def reads_weight(node: Expression) -> bool:
    """Whether W occurs in the expression."""
    return node.operation == "weight" or any(reads_weight(part) for part in node.arguments)


def tensors_read(node: Expression) -> frozenset[str]:
    """Names of the tensors that occur in the expression."""
    found = frozenset([node.name]) if node.operation == "tensor" else frozenset()
    return found.union(*(tensors_read(part) for part in node.arguments))


def gradients_reach(node: Expression) -> frozenset[str]:
    """Names of the tensors that a gradient can reach from the value, those of earlier blocks by their names there."""
    match node.operation:
        case "tensor":
            return frozenset([node.name.partition(MARK)[0]])
        case "multiply" | "matmul" if Quantity.of(0) in map(_filled, node.arguments):
            return frozenset()
    parts = STRUCTURES[node.operation].learning(node.arguments) if is_structure(node) else node.arguments
    return frozenset[str]().union(*map(gradients_reach, parts))


assert is_structure(Expression("diag"))  # the match statements above rely on the registry being filled at import
