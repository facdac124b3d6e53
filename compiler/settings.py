"""Settings by name, each with its kind: what all blocks share, and the `model` and `train` blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from surgery.compiler import nodes
from surgery.compiler.algebra.build import Builder
from surgery.compiler.diagnostics import Diagnostics, SurgError, did_you_mean, fail
from surgery.compiler.plan import ModelPlan, Place, Quantized
from surgery.compiler.printer import show
from surgery.compiler.span import Span

Reader = Callable[[nodes.Expr], Any]

TASKS = {
    "causal_lm": False,
    "masked_lm": False,
    "seq2seq_lm": False,
    "sequence_classification": True,
    "token_classification": True,
    "image_classification": True,
    "feature_extraction": False,
}  # task: whether it takes labels = n
DTYPES = ("float32", "float64", "bfloat16", "float16")


def place(span: Span | None) -> Place:
    """A span as the plan keeps it."""
    if span is None:
        return Place(file="", line=1, column=1, start=0, end=0)
    return Place(file=span.file, line=span.line, column=span.column, start=span.start, end=span.end)


def number(node: nodes.Expr) -> float:
    """A known number."""
    constant = Builder({}).number(node).constant
    assert constant is not None  # there are no names in scope, so nothing is unknown
    return float(constant)


def at_least(least: float, *, above: bool = False, below: float | None = None) -> Reader:
    """A number of at least (or above) `least`, and below `below`."""

    def read(node: nodes.Expr) -> float:
        value = number(node)
        if value < least or (above and value == least) or (below is not None and value >= below):
            bound = f"{'above' if above else 'at least'} {least:g}" + ("" if below is None else f" and below {below:g}")
            raise fail("SURG004", f"this must be {bound}, not {value:g}", node.span)
        return value

    return read


def share(node: nodes.Expr) -> float:
    """A number from 0 to 1."""
    value: float = at_least(0)(node)
    if value > 1:
        raise fail("SURG004", f"this is a share, from 0 to 1, not {value:g}", node.span)
    return value


LARGEST_COUNT = (1 << 31) - 1


def whole(least: int, most: int = LARGEST_COUNT) -> Reader:
    """A whole number from `least` to `most`."""

    def read(node: nodes.Expr) -> int:
        value = Builder({}).number(node).whole
        if value is None or value < least:
            raise fail("SURG004", f"this must be a whole number of at least {least}, not `{show(node)}`", node.span)
        if value > most:
            raise fail("SURG004", f"this must be at most {most:,}, not `{show(node)}`", node.span)
        return value

    return read


def wholes(least: int) -> Reader:
    """`[3, 17]`: two or more different whole numbers of at least `least`."""

    def read(node: nodes.Expr) -> tuple[int, ...]:
        items = node.items if isinstance(node, nodes.ListOf) else ()
        values = tuple(map(whole(least), items))
        if len(values) < 2 or len(set(values)) < len(values):
            raise fail("SURG004", f"different whole numbers are needed here: `[3, 17]`, not `{show(node)}`", node.span)
        return values

    return read


def word(*words: str) -> Reader:
    """A bare word or a text; with `words`, one of them."""

    def read(node: nodes.Expr) -> str:
        value = node.name if isinstance(node, nodes.Name) else node.value if isinstance(node, nodes.String) else None
        if value is None:
            raise fail("SURG004", f"a word or a text is needed here, not `{show(node)}`", node.span)
        if words and value not in words:
            help_text = did_you_mean(value, words)
            raise fail("SURG002", f"`{value}` is not known here", node.span, help=help_text)
        return value

    return read


def text(node: nodes.Expr) -> str:
    """A text in double quotes."""
    if not isinstance(node, nodes.String):
        raise fail("SURG004", f"a text in double quotes is needed here, not `{show(node)}`", node.span)
    return node.value


def truth(node: nodes.Expr) -> bool:
    """true or false."""
    if not isinstance(node, nodes.Boolean):
        raise fail("SURG004", f"true or false is needed here, not `{show(node)}`", node.span)
    return node.value


def pair(node: nodes.Expr) -> tuple[float, float]:
    """`[0.9, 0.999]`: two numbers from 0 to below 1."""
    if not isinstance(node, nodes.ListOf) or len(node.items) != 2:
        raise fail("SURG004", "two numbers are needed here: `[0.9, 0.999]`", node.span)
    first, second = (at_least(0, below=1)(item) for item in node.items)
    return first, second


def call(node: nodes.Expr) -> nodes.Call:
    """`name(arguments)`, or a bare name as a call without arguments."""
    if isinstance(node, nodes.Name):
        return nodes.Call(node.name, (), span=node.span)
    if not isinstance(node, nodes.Call):
        raise fail("SURG004", f"a name with arguments is needed here, not `{show(node)}`", node.span)
    return node


def arguments(node: nodes.Call, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """Arguments by name (or by position in the order of `readers`), each read by its kind."""
    values: dict[str, Any] = {}
    for position, argument in enumerate(node.arguments):
        names = list(readers)
        name = argument.name or (names[position] if position < len(names) else "")
        if name not in readers:
            known = did_you_mean(name, names)
            raise fail(
                "SURG002",
                f"`{node.function}` has no argument `{name or show(argument.value)}`",
                argument.span,
                help=known,
            )
        if name in values:
            raise fail("SURG009", f"`{name}` is given twice", argument.span)
        values[name] = readers[name](argument.value)
    return values


def variant(node: nodes.Expr, kinds: Mapping[str, Mapping[str, Reader]], unknown: str) -> tuple[str, dict[str, Any]]:
    """One of several kinds by its name, and its arguments; SURG002 says `unknown` and the name of any other."""
    given = call(node)
    if given.function not in kinds:
        known = did_you_mean(given.function, kinds)
        raise fail("SURG002", f"{unknown} `{given.function}`", node.span, help=known)
    return given.function, arguments(given, kinds[given.function])


def _task(node: nodes.Expr) -> tuple[str, int | None]:
    given = call(node)
    name = word(*TASKS)(nodes.Name(given.function, span=given.span))
    values = arguments(given, {"labels": whole(1)} if TASKS[name] else {})
    return name, values.get("labels")


MODEL: dict[str, Reader] = {
    "task": _task,
    "dtype": word(*DTYPES),
    "revision": word(),
    "tokenizer": text,
    "attention": word("sdpa", "eager", "flash_attention_2"),
    "quantize": word(*get_args(Quantized)),
}
TRAIN: dict[str, Reader] = {"lr": at_least(0, above=True), "weight_decay": at_least(0)}


def read_settings(
    settings: Iterable[nodes.Line], readers: Mapping[str, Reader], block: str, diagnostics: Diagnostics,
    inside: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The settings of a block by name; unknown, repeated and unfit ones are collected.

    `inside` says how names are written that are no settings, but arguments of one.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        if not isinstance(setting, nodes.Setting):
            continue
        if setting.name not in readers:
            known = (inside or {}).get(setting.name) or did_you_mean(setting.name, readers)
            diagnostics.error("SURG002", f"`{block}` has no setting `{setting.name}`", setting.span, help=known)
        elif setting.name in values:
            diagnostics.error("SURG009", f"`{setting.name}` is set twice", setting.span)
        else:
            values[setting.name] = None
            try:
                values[setting.name] = readers[setting.name](setting.value)
            except SurgError as error:
                diagnostics.found += error.diagnostics
    return values


def read_model(item: nodes.Model, diagnostics: Diagnostics) -> ModelPlan:
    """The `model` line."""
    values = read_settings(item.settings, MODEL, "model", diagnostics)
    task, labels = values.pop("task", None) or (None, None)
    return ModelPlan(source=item.source, name=item.name, task=task, labels=labels, **values)  # type: ignore[arg-type]
