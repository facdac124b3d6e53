"""Tree -> Program: names, kinds, shapes and facts; needs no model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from surgery.compiler import nodes, p1_parse
from surgery.compiler.active import read_active
from surgery.compiler.algebra.arguments import bind_arguments
from surgery.compiler.algebra.compose import calls, formula_of
from surgery.compiler.algebra.measured import Gain
from surgery.compiler.algebra.method import elaborate
from surgery.compiler.algebra.names import COORDINATES, names_in
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.bound import arguments_of, bound
from surgery.compiler.data_settings import check_data, read_data
from surgery.compiler.diagnostics import Diagnostics, Note, SurgError, fail
from surgery.compiler.library import library
from surgery.compiler.pattern import parse_pattern
from surgery.compiler.printer import show
from surgery.compiler.program import Moving, Program, Rule, TrainRule
from surgery.compiler.settings import TRAIN, read_model, read_settings, word
from surgery.compiler.source import read
from surgery.compiler.span import Source
from surgery.compiler.step_settings import check_step, read_steps

SYMBOLIC = ("in", "out", *sorted(COORDINATES))
RULE_SETTINGS = {
    "strategy": word("auto", "branch", "fold", "recompute"),
    "update": word("literal", "telescope"),
    "active": read_active,
}


def run(tree: nodes.Tree, folder: Path | None = None) -> Program:
    """Check a tree; raises `SurgError` with everything that is wrong. `folder` is where its files are looked for."""
    folder = folder or Path()
    diagnostics = Diagnostics()
    own, broken = _methods(tree, folder, diagnostics)
    methods = {**library(), **own}
    _reject_repeated(tree, diagnostics)
    rules, trained, frozen = [], [], []
    model = data = None
    for item in tree.items:
        match item:
            case nodes.Model():
                model = model or read_model(item, diagnostics)
            case nodes.Data():
                data = data or read_data(item, diagnostics)
            case nodes.Adapt():
                if rule := _rule(item, methods, broken, diagnostics):
                    rules.append(rule)
            case nodes.Train():
                trained.append(_train(item, diagnostics))
            case nodes.Freeze():
                _pattern(item.pattern, diagnostics)
                frozen.append(item)
    blocks = [item for item in tree.items if isinstance(item, nodes.Step)]
    steps = read_steps(blocks, diagnostics)
    moving = tuple(_moving(block, diagnostics) for block in blocks) or (Moving(),)
    if data is not None and not diagnostics.errors:
        check_data(model, data, next(item for item in tree.items if isinstance(item, nodes.Data)), diagnostics)
    check_step(tree, model, data, steps[0], diagnostics)
    diagnostics.raise_errors()
    source = tree.span.source if tree.span else Source("<program>", show(tree))
    return Program.of(
        source=source, tree=tree, folder=folder, model=model, rules=tuple(rules), trained=tuple(trained),
        frozen=tuple(frozen), steps=steps, moving=moving, data=data, methods=methods,
        warnings=tuple(diagnostics.warnings),
    )  # fmt: skip


def _train(item: nodes.Train, diagnostics: Diagnostics) -> TrainRule:
    _pattern(item.pattern, diagnostics)
    return TrainRule(item, **read_settings(item.settings, TRAIN, "train", diagnostics))


def _moving(item: nodes.Step, diagnostics: Diagnostics) -> Moving:
    frozen = tuple(line for line in item.settings if isinstance(line, nodes.Freeze))
    for line in frozen:
        _pattern(line.pattern, diagnostics)
    trained = (_train(line, diagnostics) for line in item.settings if isinstance(line, nodes.Train))
    return Moving(item, tuple(trained), frozen)


def _reject_repeated(tree: nodes.Tree, diagnostics: Diagnostics) -> None:
    for kind, word_ in ((nodes.Model, "model"), (nodes.Data, "data")):
        items = [item for item in tree.items if isinstance(item, kind)]
        for item in items[1:]:
            first = Note("the first one", items[0].span)
            diagnostics.error("SURG009", f"a spec has one `{word_}`", item.span, notes=[first])


def _methods(tree: nodes.Tree, folder: Path, diagnostics: Diagnostics) -> tuple[dict[str, nodes.Method], set[str]]:
    """The methods that the spec defines or uses, and the names of those that are wrong in themselves."""
    found: dict[str, nodes.Method] = {}
    broken: set[str] = set()
    items = []
    for item in tree.items:
        if isinstance(item, nodes.Use):
            try:
                items += _used(item, folder)
            except SurgError as error:
                diagnostics.found += error.diagnostics
        elif isinstance(item, nodes.Method):
            items.append(item)
    for method in items:
        if method.name in found:
            first = Note("the first one", found[method.name].span)
            diagnostics.error("SURG009", f"`{method.name}` is defined twice", method.span, notes=[first])
            continue
        found[method.name] = method
        problems = check_method(method).found
        if problems:
            broken.add(method.name)
            diagnostics.found += problems
    return found, broken


def _used(item: nodes.Use, folder: Path) -> list[nodes.Method]:
    path = folder / item.path
    tree = p1_parse.run(read(path, item.span, help=f"looked for {path}"))
    others = [entry for entry in tree.items if not isinstance(entry, nodes.Method)]
    if others:
        raise fail(
            "SURG004", f"`{item.path}` may hold methods only", others[0].span, notes=[Note("used here", item.span)]
        )
    return [entry for entry in tree.items if isinstance(entry, nodes.Method)]


def check_method(method: nodes.Method) -> Diagnostics:
    """Everything that is wrong with a method at symbolic sizes."""
    try:
        arguments = bind_arguments(method, None)
    except SurgError as error:
        return Diagnostics(list(error.diagnostics))
    names = [parameter.name for parameter in method.parameters]
    diagnostics = Diagnostics()
    for position, name in enumerate(names):
        if name in names[:position]:
            diagnostics.error("SURG009", f"`{name}` is a parameter twice", method.parameters[position].span)
    diagnostics.found += elaborate(method, arguments, {name: Quantity.symbol(name) for name in SYMBOLIC})[1].found
    return diagnostics


def _pattern(pattern: nodes.Pattern, diagnostics: Diagnostics) -> None:
    try:
        parse_pattern(pattern)
    except SurgError as error:
        diagnostics.found += error.diagnostics


def _rule(
    item: nodes.Adapt, methods: dict[str, nodes.Method], broken: set[str], diagnostics: Diagnostics
) -> Rule | None:
    for pattern in (item.pattern, *item.exceptions):
        _pattern(pattern, diagnostics)
    clauses = {
        kind: [clause for clause in item.clauses if isinstance(clause, kind)]
        for kind in (nodes.With, nodes.Expect, nodes.Alias)
    }
    for kind, found in clauses.items():
        for extra in found[1:]:
            diagnostics.error("SURG009", f"`{kind.__name__.lower()}` is said twice", extra.span)
    inside = {"expect": "it is written without `=`: `expect 12`"}
    settings = read_settings(item.clauses, RULE_SETTINGS, "adapt", diagnostics, inside)
    if not clauses[nodes.With]:
        diagnostics.error("SURG004", "the rule does not say what to do", item.span, help="add `with lora(rank = 8)`")
        return None
    try:
        (clause, *_) = clauses[nodes.With]
        assert isinstance(clause, nodes.With)
        if _broken(clause.value, broken):
            return None
        asked: list[Gain] = []
        method, values = bound(clause.value, methods, asked)
        formula, problems = formula_of(method, values, {name: Quantity.symbol(name) for name in SYMBOLIC})
        if formula is None:
            used = Note("used by this rule", clause.value.span)
            raise SurgError([replace(found, notes=(*found.notes, used)) for found in problems.found])
    except SurgError as error:
        diagnostics.found += error.diagnostics
        return None
    expects = [clause.count for clause in clauses[nodes.Expect] if isinstance(clause, nodes.Expect)]
    aliases = [clause.word for clause in clauses[nodes.Alias] if isinstance(clause, nodes.Alias)]
    if settings.get("update") and not formula.moves_base:
        diagnostics.error("SURG032", f"`{method.name}` does not move W, so there is no update to choose", item.span)
    return Rule(
        item, method, arguments_of(values),
        expects[0] if expects else None, aliases[0] if aliases else None,
        settings.get("strategy") or "auto", settings.get("update") or "auto", settings.get("active"),
        tuple(dict.fromkeys(asked)),
    )  # fmt: skip


def _broken(node: nodes.Expr, broken: set[str]) -> bool:
    """Whether a `with` expression uses a method that is wrong in itself, which is said already."""
    return bool(broken & ({call.function for call in calls(node)} | names_in(node)))
