"""The method library as a whole: one method a file, short, none twice, and none of their names in Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from surgery.compiler import nodes, p1_parse
from surgery.compiler.algebra.names import names_in
from surgery.compiler.algebra.structures import STRUCTURES
from surgery.compiler.library import library
from surgery.compiler.printer import show
from surgery.compiler.span import Source
from surgery.optimizers import OPTIMIZERS

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "surgery" / "methods").glob("*.surg"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_method_is_a_short_file_of_its_name(path: Path) -> None:
    method = library()[path.stem]
    lines = path.read_text().splitlines()
    assert 1 + len(method.statements) <= 12
    assert len([line for line in lines if line and not line.startswith("#")]) <= 12 + 4 * _events(method)
    assert show(nodes.Tree((method,))) == path.read_text(), "write it as `surgery fmt` does"
    read = set().union(
        *map(names_in, method.statements), *(names_in(p.default) for p in method.parameters if p.default)
    )
    assert {parameter.name for parameter in method.parameters} <= read, "a parameter does nothing"


def _events(method: nodes.Method) -> int:
    """How many statements may stand on several lines: their heads, their changes and the ends of their blocks."""
    return sum(isinstance(statement, nodes.Event) for statement in method.statements)


class _Names(dict[str, str]):
    """A method's own names, numbered as they come."""

    def __init__(self, method: nodes.Method) -> None:
        self.own = {parameter.name for parameter in method.parameters}
        self.own |= {item.name for item in method.statements if isinstance(item, nodes.Tensor | nodes.Bind)}
        self.own -= {"delta", "weight", "output", "input"}

    def of(self, name: str) -> str:
        return self.setdefault(name, f"n{len(self)}") if name in self.own else name


def _renamed(node: Any, names: _Names) -> Any:
    """A part of a tree with its own names numbered, every number and text the same, and no comments."""
    if isinstance(node, tuple):
        return tuple(_renamed(part, names) for part in node)
    if not isinstance(node, nodes.Node):
        return node
    known: dict[type, dict[str, Any]] = {nodes.Number: {"text": "0"}, nodes.String: {"value": ""}}
    parts = {field.name: _renamed(getattr(node, field.name), names) for field in fields(node) if field.init}
    if isinstance(node, nodes.Line):
        parts["comments"] = ()
    if isinstance(node, nodes.Name | nodes.Tensor | nodes.Bind):
        parts["name"] = names.of(node.name)
    return replace(node, **{**parts, **known.get(type(node), {})})


def _body(method: nodes.Method) -> str:
    """What a method says, up to the names of its parameters and tensors, to numbers, comments and a dropout."""
    names = _Names(method)
    lines = [show(_renamed(statement, names)) for statement in method.statements if not _drops(statement)]
    return "\n".join(lines)


def _drops(statement: nodes.Statement) -> bool:
    return show(replace(statement, comments=())).startswith("input = dropout(x, ")


def test_no_method_repeats_another() -> None:
    first: dict[str, str] = {}
    for name, method in library().items():
        other = first.setdefault(_body(method), name)
        assert other == name, f"{name} is {other} with other numbers: a parameter would do"


def _spelt(tree: ast.AST) -> Iterator[str]:
    """Every identifier and every text of a file, but for its docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped = {id(node.body[0].value) for node in ast.walk(tree)  # type: ignore[attr-defined]
               if isinstance(node, documented) and ast.get_docstring(node) is not None}  # fmt: skip
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in skipped:
                yield text
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name


def _called(node: Any) -> Iterator[str]:
    """Every function, start and name in a part of a tree."""
    if isinstance(node, tuple):
        for part in node:
            yield from _called(part)
    elif isinstance(node, nodes.Node):
        yield from (node.function,) if isinstance(node, nodes.Call) else ()
        yield from (node.name,) if isinstance(node, nodes.Name) else ()
        yield from _called(tuple(vars(node).values()))


def test_the_language_page_has_every_name_that_a_method_uses() -> None:
    page = set(re.findall(r"\w+", (ROOT / "docs" / "language.md").read_text()))
    for method in library().values():
        own = {item.name for item in method.statements if isinstance(item, nodes.Tensor | nodes.Bind)}
        own |= {parameter.name for parameter in method.parameters}
        own |= {name for item in method.statements for name in _variables(item)}
        assert set(_called(method.statements)) - own <= page, method.name


def _variables(node: Any) -> Iterator[str]:
    """The variables of every range in a part of a tree."""
    if isinstance(node, tuple):
        for part in node:
            yield from _variables(part)
    elif isinstance(node, nodes.Node):
        yield from (node.variable,) if isinstance(node, nodes.Comprehension) else ()
        yield from _variables(tuple(vars(node).values()))


def test_no_python_knows_a_method() -> None:
    # `toeplitz` is a function of the language as well, `geolora` an optimizer
    methods = set(library()) - set(STRUCTURES) - set(OPTIMIZERS)
    for folder in ("surgery", "compiler", "grammar"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_relative_to(ROOT / "surgery" / "peft"):  # a spec written from peft's names says the method's
                continue
            found = methods & set(_spelt(ast.parse(path.read_text())))
            assert not found, f"{path.relative_to(ROOT)} knows {', '.join(sorted(found))}"


def test_a_copy_with_other_names_and_numbers_would_be_found() -> None:
    text = """
        method copy(size: int = 5, weight_of_it: real = 3) {
            P = train kaiming_uniform[size, in]
            Q = train zeros[out, size]
            delta = (weight_of_it / size) * Q @ P
        }
    """
    (copied,) = p1_parse.run(Source("<text>", text)).items
    assert isinstance(copied, nodes.Method) and _body(copied) == _body(library()["lora"])
    assert _body(copied) != _body(library()["rslora"])
