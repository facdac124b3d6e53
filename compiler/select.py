"""Patterns against a real module tree: what a rule selects, and located answers for what it does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from surgery.compiler import nodes
from surgery.compiler.algebra.build import Builder, Value
from surgery.compiler.algebra.expression import number
from surgery.compiler.algebra.names import names_in
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.diagnostics import Diagnostics, Note, SurgError, did_you_mean, nearest
from surgery.compiler.pattern import Part, matches, parent_patterns, parse_pattern, unmatched
from surgery.compiler.program import Rule
from surgery.compiler.skeleton import Skeleton
from surgery.compiler.weights import Weight

MOST_LISTED = 8


@dataclass
class Selection:
    """The weights that one rule selects."""

    rule: Rule
    weights: list[Weight] = field(default_factory=list)


def listed(names: list[str]) -> str:
    """Some names for people: all of a few, the first of many."""
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(f"`{name}`" for name in names[:MOST_LISTED]) + more


def select_sites(rule: Rule, skeleton: Skeleton, diagnostics: Diagnostics) -> Selection:
    """The weights that a rule's pattern, classes, condition and exceptions leave."""
    selection = Selection(rule)
    found = matched(rule.node.pattern, skeleton.aliases, diagnostics)
    if not found:
        return selection
    found = _of_class(rule, found, skeleton, diagnostics)
    found = _except(rule, found, skeleton, diagnostics)
    weights = _adaptable(rule, found, skeleton, diagnostics)
    weights = _where(rule, weights, skeleton, diagnostics)
    if rule.expect is not None and len(weights) != rule.expect:
        span = next(clause.span for clause in rule.node.clauses if isinstance(clause, nodes.Expect))
        message = f"{rule.expect} sites are expected, {len(weights)} match"
        diagnostics.error("SURG022", message, span, notes=[Note("this pattern", rule.node.pattern.span)])
    selection.weights = [_tied(rule, weight, skeleton, diagnostics) for weight in weights]
    alone = [weight.path for weight in weights if not _others(weight, skeleton)]
    if rule.alias is not None and alone:
        span = next(clause.span for clause in rule.node.clauses if isinstance(clause, nodes.Alias))
        message = f"{listed(alone)} {'is' if len(alone) == 1 else 'are'} not tied to anything"
        diagnostics.error("SURG024", message, span, help="leave the word out")
    return selection


def select_parameters(pattern: nodes.Pattern, skeleton: Skeleton, diagnostics: Diagnostics) -> list[str]:
    """Full names of all parameters in the modules (or with the names) that a pattern matches."""
    paths = matched(pattern, skeleton.aliases, diagnostics)
    found = within(paths, skeleton.parameters)
    if paths and not found:
        diagnostics.error("SURG020", f"`{pattern.text}` has no parameters", pattern.span)
    return found


def within(paths: Sequence[str], names: Iterable[str]) -> list[str]:
    """Those of some names that are among the paths, or below one of them."""
    prefixes, exact = tuple(f"{path}." for path in paths), set(paths)
    return [name for name in names if name in exact or name.startswith(prefixes)]


def matched(pattern: nodes.Pattern, aliases: Mapping[str, str], diagnostics: Diagnostics) -> list[str]:
    """The real paths of all that a pattern matches among `aliases`, which name them."""
    parts = parse_pattern(pattern)
    paths = list(aliases)
    wanted = {aliases[path] for path in paths if matches(parts, path)}
    found = [path for path in dict.fromkeys(aliases.values()) if path in wanted]
    if not found:
        _report_nothing(pattern, parts, paths, diagnostics)
    elif missing := unmatched(parts, paths):
        for text in missing:
            help_text = _nearest_alternative(text, paths)
            diagnostics.error("SURG021", f"`{text}` in `{pattern.text}` matches nothing", pattern.span, help=help_text)
    return found


def _nearest_alternative(text: str, paths: list[str]) -> str | None:
    if text.startswith("["):
        return "the model has no block of that number"
    return did_you_mean(text, sorted({component for path in paths for component in path.split(".")}))


def _report_nothing(
    pattern: nodes.Pattern, parts: tuple[Part, ...], paths: list[str], diagnostics: Diagnostics
) -> None:
    components = {component for path in paths for component in path.split(".")}
    for option in unmatched(parts, paths) if "{" in pattern.text else ():
        if option not in components and (text := nearest(option, components)):
            message = f"nothing in the model matches `{pattern.text}`"
            diagnostics.error("SURG020", message, pattern.span, help=f"did you mean `{text}` for `{option}`?")
            return
    for parent in parent_patterns(pattern.text):
        parent_parts = parse_pattern(nodes.Pattern(parent, span=pattern.span))
        parents = [path for path in paths if matches(parent_parts, path)]
        if parents:
            rest, inside = pattern.text[len(parent) + 1 :].split(".")[0], set(parents)
            below = [path for path in paths if path.rpartition(".")[0] in inside]
            if parent.endswith("**"):  # inside is everything: offered are the modules that have a weight
                known = set(paths)
                below = [path for path in below if f"{path}.weight" in known] or below
            children = sorted({path.rpartition(".")[2] for path in below})
            notes = [Note(f"`{parent}` matches {len(parents)}; inside are {listed(children)}")] if children else ()
            help_text = f"did you mean `{near}`?" if (near := nearest(rest, children)) else None
            diagnostics.error(
                "SURG020", f"nothing in the model matches `{pattern.text}`", pattern.span, notes=notes, help=help_text
            )
            return
    deeper = nodes.Pattern(f"**.{pattern.text}", span=pattern.span)
    deeper_parts = parse_pattern(deeper)
    top = sorted({path.split(".")[0] for path in paths})
    help_text = did_you_mean(pattern.text, paths)
    if any(matches(deeper_parts, path) for path in paths):
        help_text = f"paths are written from the top: `{deeper.text}` matches at any depth"
    elif near := nearest(pattern.text.split(".")[0], top):
        help_text = f"did you mean `{near}`?"
    notes = [Note(f"at the top are {listed(top)}")]
    diagnostics.error(
        "SURG020", f"nothing in the model matches `{pattern.text}`", pattern.span, notes=notes, help=help_text
    )


def _of_class(rule: Rule, found: list[str], skeleton: Skeleton, diagnostics: Diagnostics) -> list[str]:
    classes = rule.node.classes
    if not classes:
        return found
    present = sorted({type(skeleton.modules[path]).__name__ for path in found if path in skeleton.modules})
    for name in classes:
        if name not in present:
            message = f"no module that `{rule.node.pattern.text}` matches is a {name}"
            diagnostics.error("SURG021", message, rule.node.pattern.span, help=did_you_mean(name, present))
    return [path for path in found if path in skeleton.modules and type(skeleton.modules[path]).__name__ in classes]


def _except(rule: Rule, found: list[str], skeleton: Skeleton, diagnostics: Diagnostics) -> list[str]:
    for pattern in rule.node.exceptions:
        parts = parse_pattern(pattern)
        wanted = {real for path, real in skeleton.aliases.items() if matches(parts, path)}
        removed = [path for path in found if path in wanted]
        if not removed:
            message = f"`except {pattern.text}` takes nothing away"
            diagnostics.error("SURG021", message, pattern.span, notes=[Note("from this", rule.node.pattern.span)])
        found = [path for path in found if path not in set(removed)]
    return found


def _adaptable(rule: Rule, found: list[str], skeleton: Skeleton, diagnostics: Diagnostics) -> list[Weight]:
    weights: dict[int, Weight] = {}
    unsupported: dict[tuple[str, str], list[str]] = {}
    unknown: list[str] = []
    classes, on_outputs = bool(rule.node.classes), _reads_only_y(rule)
    for path in found:
        is_parameter = path in skeleton.parameters
        if is_parameter and (classes or path.rpartition(".")[0] in found):
            continue  # a pattern that names modules also fits the parameters in them: `**`
        weight = skeleton.weight(path)
        module = skeleton.modules.get(path)
        if weight is None and on_outputs and module is not None and type(module).forward is not nn.Module.forward:
            weight = skeleton.output(path)
            if weight is None:
                unknown.append(path)
                continue
        if isinstance(weight, Weight) and path in (weight.path, weight.parameter):
            weights.setdefault(weight.identity, weight)
        else:
            kind = "parameter" if module is None else type(module).__name__
            unsupported.setdefault((kind, weight if isinstance(weight, str) else ""), []).append(path)
    span = rule.node.pattern.span
    for (kind, reason), paths in unsupported.items():
        modules = [skeleton.modules[path] for path in paths if path in skeleton.modules]
        if not reason and modules and not any(True for module in modules for _ in module.parameters(recurse=False)):
            reason = "it has no weight of its own, so its method may read nothing but `y`"
        message = f"{kind} cannot be adapted: {listed(paths)}" + (f": {reason}" if reason else "")
        help_text = "restrict the rule with `: Linear`, or subtract them with `except`"
        if any(True for module in modules for _ in module.children()):
            help_text = f"name the modules in it, such as `{rule.node.pattern.text}.** : Linear`, or use `except`"
        inner = _parameters_inside(paths, skeleton)
        if inner:
            help_text = f"name its parameters: {listed(inner)}"
        if kind == "Adapted":
            message = f"{listed(paths)}: adapted already"
            help_text = "apply all rules in one program, to a fresh model"
        diagnostics.error("SURG025", message, span, help=help_text)
    if unknown:
        message = f"the size of the output is not known: {listed(unknown)}"
        help_text = "give `example_inputs` that reach it, or adapt a module that has a weight"
        diagnostics.error("SURG034", message, span, help=help_text)
    return list(weights.values())


def _reads_only_y(rule: Rule) -> bool:
    """Whether the rule's method needs neither W nor x, so that any module's output will do."""
    statements = rule.method.statements
    says = any(isinstance(statement, nodes.Bind) and statement.name == "output" for statement in statements)
    return says and not {"x", "W"} & set().union(*map(names_in, statements))


def _parameters_inside(paths: list[str], skeleton: Skeleton) -> list[str]:
    """The parameters of modules that can be adapted by their own names, as those of a stack of experts."""
    names = [f"{path}.{name}" for path in paths if path in skeleton.modules
             for name, _ in skeleton.modules[path].named_parameters(recurse=False)]  # fmt: skip
    return [name for name in names if isinstance(skeleton.weight(name), Weight)]


def _where(rule: Rule, weights: list[Weight], skeleton: Skeleton, diagnostics: Diagnostics) -> list[Weight]:
    if rule.node.where is None:
        return weights
    kept = []
    for weight in weights:
        block = skeleton.block(weight.path)
        names: dict[str, Value] = {
            "in": number(Quantity.of(weight.inputs)), "out": number(Quantity.of(weight.outputs)),
            "kind": skeleton.kind(weight.path), "path": weight.path,
            "layer": number(Quantity.of(block[1] if block else -1)),
        }  # fmt: skip
        try:
            if Builder(names).condition(rule.node.where).value:
                kept.append(weight)
        except SurgError as error:
            diagnostics.found += error.diagnostics
            return []
    if weights and not kept:
        diagnostics.error("SURG020", "the condition leaves no site", rule.node.where.span)
    return kept


def _others(weight: Weight, skeleton: Skeleton) -> list[str]:
    """The other places of a tied weight: one module under two paths is one place."""
    if not weight.parameter:
        return []
    names = [name for name in skeleton.owners[weight.identity] if name != weight.parameter]
    module = skeleton.modules.get(weight.parameter.rpartition(".")[0])
    return [name for name in names if skeleton.modules.get(name.rpartition(".")[0]) is not module]


def _tied(rule: Rule, weight: Weight, skeleton: Skeleton, diagnostics: Diagnostics) -> Weight:
    """The weight as the rule means it: one that is tied needs `untie`, or `tie`, which adapts it in the head's name."""
    others = _others(weight, skeleton)
    if others and rule.alias is None:
        message = f"`{weight.parameter}` is tied to {listed(others)}"
        help_text = (
            "add `untie` to the rule: the adapted one gets a weight of its own; or `tie`, to adapt them together"
        )
        diagnostics.error("SURG024", message, rule.node.pattern.span, help=help_text)
    if others and rule.alias == "tie":
        together = [weight, *(other for name in others if isinstance(other := skeleton.weight(name), Weight))]
        return next((other for other in together if other.layout.module_class == "Linear"), weight)
    return weight
