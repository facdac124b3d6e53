"""Programs without text: `Program(adapt("**.query", method("lora", rank = 8)), step(batch = 32))`.

Every function gives a node of the tree; `Program` prints them and reads the text back, so that a program built here and
one written by hand are checked alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from surgery.compiler import nodes


def expression(value: Any) -> nodes.Expr:
    """A Python value as an expression: numbers, texts (words where they are names), booleans, pairs, calls."""
    match value:
        case bool():
            return nodes.Boolean(value)
        case int() | float():
            text = nodes.Number(repr(abs(value)))
            return nodes.Unary("-", text) if value < 0 else text
        case str():
            return nodes.Name(value) if value.isidentifier() else nodes.String(value)
        case list() | tuple():
            return nodes.ListOf(tuple(expression(item) for item in value))
        case nodes.Node():
            return value  # type: ignore[return-value]
    raise TypeError(f"{value!r} has no place in a program: use numbers, texts, booleans, lists and surgery.call")


def call(function: str, *arguments: Any, **named: Any) -> nodes.Call:
    """`function(arguments)`: `call("adamw", lr = 1e-3)`."""
    positional = [nodes.Argument(expression(value)) for value in arguments]
    return nodes.Call(
        function, (*positional, *(nodes.Argument(expression(value), name) for name, value in named.items()))
    )


def method(name: str, *arguments: Any, **named: Any) -> nodes.Call:
    """A method of the library or of the program, with its parameters: `method("lora", rank = 8)`.

    Unlike `call`, a text stays a text. Methods of the form `delta` compose: `method("lora") + 2 * method("vera")`.
    """
    quoted = {key: nodes.String(value) if isinstance(value, str) else value for key, value in named.items()}
    return call(name, *(nodes.String(value) if isinstance(value, str) else value for value in arguments), **quoted)


def _settings(values: Mapping[str, Any], texts: Iterable[str] = ()) -> tuple[nodes.Setting, ...]:
    quoted = set(texts)
    return tuple(
        nodes.Setting(name, nodes.String(value) if name in quoted and isinstance(value, str) else expression(value))
        for name, value in values.items()
    )


def model(name: str, *, source: str = "hub", **settings: Any) -> nodes.Model:
    """`model "name" { ... }`; source: hub (also folders and packages), config or python."""
    return nodes.Model(source, name, _settings(settings, ["revision", "tokenizer"]))


def adapt(
    pattern: str, method: str | nodes.Expr, *, expect: int | None = None, classes: Iterable[str] = (),
    where: str | None = None, exclude: Iterable[str] = (), alias: str | None = None, **settings: Any,
) -> nodes.Adapt:  # fmt: skip
    """`adapt PATTERN : Class where ... except ... { with METHOD  expect N }`.

    `where` is a condition as text ("in >= 256"); `alias` is "tie" or "untie"; settings are `strategy` and `update`.
    """
    clauses: list[Any] = [nodes.With(nodes.Name(method) if isinstance(method, str) else method)]
    clauses += [nodes.Expect(expect)] if expect is not None else []
    clauses += [nodes.Alias(alias)] if alias is not None else []
    return nodes.Adapt(
        nodes.Pattern(pattern), tuple(classes), _condition(where) if where else None,
        tuple(nodes.Pattern(text) for text in exclude), (*clauses, *_settings(settings)),
    )  # fmt: skip


def _condition(text: str) -> nodes.Expr:
    from surgery.compiler import p1_parse
    from surgery.compiler.span import Source

    (rule,) = p1_parse.run(Source("<where>", f"adapt x where {text} {{ with lora }}")).items
    assert isinstance(rule, nodes.Adapt) and rule.where is not None
    return rule.where


def train(pattern: str, **settings: Any) -> nodes.Train:
    """`train PATTERN { lr = ... }`."""
    return nodes.Train(nodes.Pattern(pattern), _settings(settings))


def freeze(pattern: str) -> nodes.Freeze:
    """`freeze PATTERN`."""
    return nodes.Freeze(nodes.Pattern(pattern))


def step(*lines: nodes.Train | nodes.Freeze, **settings: Any) -> nodes.Step:
    """`step { train ...  optimizer = ...  batch = ... }`; `lines` are `train` and `freeze`."""
    return nodes.Step((*lines, *_settings(settings)))


def data(path: str, **settings: Any) -> nodes.Data:
    """`data "file.jsonl" { text = "{question}" }`."""
    return nodes.Data(path, _settings(settings, ["text", "prompt", "completion", "eval"]))
