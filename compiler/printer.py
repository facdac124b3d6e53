"""The canonical form of a `.surg` text: what `surgery fmt` writes, and how diagnostics and plans quote the language.

`parse(show(tree)) == tree` for every tree, and showing again changes nothing: one statement per line, one empty line
between items, few parentheses, 120 columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from surgery.compiler import nodes
from surgery.compiler.nodes import Expr, Item, Line, Node

WIDTH = 120
INDENT = "    "

_OR, _AND, _NOT, _COMPARE, _SUM, _PRODUCT, _SIGN, _POWER, _POSTFIX, _ATOM = range(10)
_STRENGTH = {"or": _OR, "and": _AND, "+": _SUM, "-": _SUM, "**": _POWER}
_STRENGTH |= dict.fromkeys(("*", "/", "//", "%", "@"), _PRODUCT)
_STRENGTH |= dict.fromkeys(("==", "!=", "<=", ">=", "<", ">"), _COMPARE)

# Behind the `=` of a method these words begin a tensor, so an expression that begins with one needs parentheses.
_ROLE = re.compile(r"(train|frozen|state)\b")
_UNPRINTABLE = re.compile(r"[\x7f]")


def show(node: Node) -> str:
    """The text of a node: a whole file for a tree, an item with its comments, one line for anything smaller."""
    if isinstance(node, nodes.Tree):
        blocks = ["\n".join(_lines(item, "")) for item in node.items]
        blocks += ["\n".join(node.closing)] if node.closing else []
        return "\n\n".join(blocks) + "\n" if blocks else ""
    if isinstance(node, Item):
        return "\n".join(_lines(node, ""))
    if isinstance(node, Line):
        return _line(node)
    return _inline(node)


# --- expressions ------------------------------------------------------------------------------------------------------


def _inline(node: Node) -> str:
    match node:
        case nodes.Number(text=text) | nodes.Name(name=text) | nodes.Pattern(text=text):
            return text
        case nodes.String(value=value):
            return _UNPRINTABLE.sub(r"\\u007f", json.dumps(value, ensure_ascii=False))
        case nodes.Boolean(value=truth):
            return "true" if truth else "false"
        case nodes.Unary(operator="not", operand=operand):
            return f"not {_operand(operand, _NOT)}"
        case nodes.Unary(operator=operator, operand=operand):
            return f"{operator}{_operand(operand, _SIGN)}"
        case nodes.Binary(operator=operator, left=left, right=right):
            return _binary(operator, left, right)
        case nodes.Transpose(operand=operand):
            return f"{_dotted(operand)}.T"
        case nodes.Field(operand=operand, name=name):
            return f"{_dotted(operand)}.{name}"
        case nodes.Argument(value=value, name=argument):
            return _inline(value) if argument is None else f"{argument} = {_inline(value)}"
        case nodes.Call(function=function, arguments=arguments):
            return f"{function}({_list(arguments)})"
        case nodes.Slice(start=start, stop=stop):
            return f"{_inline(start) if start else ''}:{_inline(stop) if stop else ''}"
        case nodes.Subscript(operand=operand, indices=indices):
            return f"{_operand(operand, _POSTFIX)}[{_list(indices)}]"
        case nodes.ListOf(items=items):
            return f"[{_list(items)}]"
        case nodes.Comprehension(body=body, variable=variable, first=first, last=last):
            lower = _inline(first)
            lower = f"({lower})" if lower.endswith(".") else lower  # `1...8` would read as `1` and `...`
            return f"{_inline(body)} for {variable} in {lower}..{_inline(last)}"
        case nodes.Parameter(name=name, kind=kind, default=default):
            return f"{name}: {kind}" + (f" = {_inline(default)}" if default else "")
    raise TypeError(f"{type(node).__name__} is no part of the language")


def _list(parts: Sequence[Node]) -> str:
    return ", ".join(map(_inline, parts))


def _binary(operator: str, left: Expr, right: Expr) -> str:
    strength = _STRENGTH[operator]
    if operator == "**":  # reads from the right, and its right side may carry a sign
        return f"{_operand(left, _POSTFIX)} ** {_operand(right, _SIGN)}"
    lowest = strength + 1 if strength == _COMPARE else strength  # comparisons do not chain
    if isinstance(left, nodes.Binary) and _misread(left.operator, operator):
        lowest = _ATOM
    higher = _ATOM if isinstance(right, nodes.Binary) and _misread(right.operator, operator) else strength + 1
    return f"{_operand(left, lowest)} {operator} {_operand(right, higher)}"


def _misread(inner: str, outer: str) -> bool:
    """Whether readers want parentheses that the precedence does not need: `(a / b) * C`, `a or (b and c)`."""
    return outer in ("*", "@") and inner in ("/", "//", "%") or outer == "or" and inner == "and"


def _strength(node: Node) -> int:
    match node:
        case nodes.Binary(operator=operator):
            return _STRENGTH[operator]
        case nodes.Unary(operator=operator):
            return _NOT if operator == "not" else _SIGN
        case nodes.Transpose() | nodes.Field() | nodes.Subscript():
            return _POSTFIX
    return _ATOM


def _operand(node: Expr, lowest: int) -> str:
    return _inline(node) if _strength(node) >= lowest else f"({_inline(node)})"


def _dotted(node: Expr) -> str:
    # `1.T` would read as the number `1.`
    return f"({node.text})" if isinstance(node, nodes.Number) else _operand(node, _POSTFIX)


# --- lines ------------------------------------------------------------------------------------------------------------


def _line(node: Line) -> str:
    """A line without its comments; an event with all its changes on one line."""
    match node:
        case nodes.Setting(name=name, value=value):
            return f"{name} = {_inline(value)}"
        case nodes.Bind(name=name, value=value):
            text = _inline(value)
            return f"{name} = ({text})" if _ROLE.match(text) else f"{name} = {text}"
        case nodes.Tensor():
            shared = f" shared by {node.shared_by}" if node.shared_by else ""
            group = f" as {node.shared_as}" if node.shared_as else ""
            options = f" {{ {', '.join(map(_line, node.options))} }}" if node.options else ""
            return f"{node.name} = {node.role} {_inline(node.start)}{shared}{group}{options}"
        case nodes.Require(condition=condition):
            return f"requires {_inline(condition)}"
        case nodes.Change(target=target, operator=operator, value=value):
            return f"{target} {operator} {_inline(value)}"
        case nodes.Reset(targets=targets):
            return f"reset {', '.join(targets)}"
        case nodes.Event(changes=changes):
            return f"{_header(node)} {{ {'; '.join(map(_line, changes))} }}" if changes else f"{_header(node)} {{}}"
        case nodes.With(value=value):
            return f"with {_inline(value)}"
        case nodes.Expect(count=count):
            return f"expect {count}"
        case nodes.Alias(word=word):
            return word
    raise TypeError(f"{type(node).__name__} is no line of the language")


def _header(node: Line) -> str:
    """What stands in front of the block of an item or event, on one line."""
    match node:
        case nodes.Use(path=path):
            return f"use {_inline(nodes.String(path))}"
        case nodes.Model(source=source, name=name):
            return f"model {'' if source == 'hub' else source + ' '}{_inline(nodes.String(name))}"
        case nodes.Data(path=path):
            return f"data {_inline(nodes.String(path))}"
        case nodes.Train(pattern=pattern):
            return f"train {pattern.text}"
        case nodes.Freeze(pattern=pattern):
            return f"freeze {pattern.text}"
        case nodes.Step():
            return "step"
        case nodes.Adapt():
            classes = f" : {' | '.join(node.classes)}" if node.classes else ""
            where = f" where {_inline(node.where)}" if node.where else ""
            exceptions = "".join(f" except {pattern.text}" for pattern in node.exceptions)
            return f"adapt {node.pattern.text}{classes}{where}{exceptions}"
        case nodes.Method(name=name, parameters=parameters):
            return f"method {name}({_list(parameters)})"
        case nodes.Event():
            when = f" when {_inline(node.when)}" if node.when else ""
            point = f"{_inline(node.interval)} steps" if node.interval else node.point
            return f"{node.phase} {point}{when}"
    raise TypeError(f"{type(node).__name__} has no header")


def _wrapped(node: nodes.Method) -> str:
    """A method's header in as many lines as its parameters need, aligned behind the parenthesis."""
    start = f"method {node.name}("
    lines, current = [], start
    for index, parameter in enumerate(node.parameters):
        text = _inline(parameter) + (")" if index == len(node.parameters) - 1 else ",")
        if current.strip() != start and len(current) + len(text) + 3 > WIDTH:
            lines.append(current.rstrip())
            current = " " * len(start)
        current += text + " "
    return "\n".join([*lines, current.rstrip()])


# --- blocks -----------------------------------------------------------------------------------------------------------


def _lines(node: Line, indent: str) -> list[str]:
    """The lines of a node with its comments."""
    above = [indent + comment if comment else "" for comment in node.comments]
    behind = f"  {node.trailing}" if node.trailing else ""
    elements = _elements(node)
    if elements is None:
        text = _header(node) if isinstance(node, nodes.Use | nodes.Freeze) else _line(node)
        return [*above, f"{indent}{text}{behind}"]
    closing: tuple[str, ...] = getattr(node, "closing", ())
    header = _header(node)
    if not elements and not closing:
        short = header if isinstance(node, nodes.Model | nodes.Train) else f"{header} {{}}"
    elif len(elements) == 1 and not closing and not _has_more_lines(elements[0]):
        short = f"{header} {{ {_short(elements[0])} }}"
    else:
        short = ""
    if short and len(indent) + len(short) <= WIDTH:
        return [*above, f"{indent}{short}{behind}"]
    if isinstance(node, nodes.Method) and len(header) + len(" {") > WIDTH:
        header = _wrapped(node)
    lines = [*above, *f"{indent}{header} {{{behind}".split("\n")]
    for element in elements:
        lines += _lines(element, indent + INDENT)
    lines += [indent + INDENT + comment if comment else "" for comment in closing]
    return [*lines, indent + "}"]


def _elements(node: Line) -> Sequence[Line] | None:
    """The lines in a node's block, None for a node without one."""
    match node:
        case nodes.Model() | nodes.Data() | nodes.Train() | nodes.Step():
            return node.settings
        case nodes.Adapt():
            return node.clauses
        case nodes.Method():
            return node.statements
        case nodes.Event():
            return node.changes
    return None


def _has_more_lines(element: Line) -> bool:
    return bool(element.comments or element.trailing or isinstance(element, nodes.Event | nodes.Train))


def _short(element: Line) -> str:
    return _header(element) if isinstance(element, nodes.Freeze) else _line(element)
