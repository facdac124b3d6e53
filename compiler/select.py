"""Patterns against a real module tree: what a rule selects, and located answers for what it does not."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.compiler import nodes
from surgery.compiler.algebra.build import Builder, Value, number
from surgery.compiler.algebra.quantity import Quantity
from surgery.compiler.diagnostics import Diagnostics, Note, SurgError, did_you_mean, nearest
from surgery.compiler.pattern import Part, matches, parent_patterns, parse_pattern, unmatched
from surgery.compiler.program import Rule
from surgery.compiler.skeleton import Skeleton, Weight

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
    found = _matched(rule.node.pattern, skeleton, diagnostics)
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
    selection.weights = _untied(rule, weights, skeleton, diagnostics)
    return selection


def select_parameters(pattern: nodes.Pattern, skeleton: Skeleton, diagnostics: Diagnostics) -> list[str]:
    """Full names of all parameters in the modules (or with the names) that a pattern matches."""
    paths = _matched(pattern, skeleton, diagnostics)
    prefixes = tuple(f"{path}." for path in paths)
    exact = set(paths)
    found = [name for name in skeleton.parameters if name in exact or name.startswith(prefixes)]
    if paths and not found:
        diagnostics.error("SURG020", f"`{pattern.text}` has no parameters", pattern.span)
    return found


def _matched(pattern: nodes.Pattern, skeleton: Skeleton, diagnostics: Diagnostics) -> list[str]:
    parts = parse_pattern(pattern)
    paths = list(skeleton.aliases)
    wanted = {skeleton.aliases[path] for path in paths if matches(parts, path)}
    found = [path for path in dict.fromkeys(skeleton.aliases.values()) if path in wanted]
    if not found:
        _report_nothing(pattern, parts, paths, diagnostics)
    elif missing := unmatched(parts, paths):
        for text in missing:
            help_text = _nearest_alternative(text, parts, paths)
            diagnostics.error("SURG021", f"`{text}` in `{pattern.text}` matches nothing", pattern.span, help=help_text)
    return found


def _nearest_alternative(text: str, parts: tuple[Part, ...], paths: list[str]) -> str | None:
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
            rest = pattern.text[len(parent) + 1 :].split(".")[0]
            children = sorted(
                {path[len(parents[0]) + 1 :].split(".")[0] for path in paths if path.startswith(f"{parents[0]}.")}
            )
            notes = [Note(f"`{parent}` matches {len(parents)}; inside are {listed(children)}")] if children else ()
            help_text = f"did you mean `{near}`?" if (near := nearest(rest, children)) else None
            diagnostics.error(
                "SURG020", f"nothing in the model matches `{pattern.text}`", pattern.span, notes=notes, help=help_text
            )
            return
    help_text = did_you_mean(pattern.text, paths)
    if near := nearest(pattern.text.split(".")[0], top := sorted({path.split(".")[0] for path in paths})):
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
    unsupported: dict[str, list[str]] = {}
    classes = bool(rule.node.classes)
    for path in found:
        owner = path.rpartition(".")[0] if path in skeleton.parameters else path
        if path in skeleton.parameters and (classes or owner in found):
            continue  # a pattern that names modules also fits the parameters in them: `**`
        weight = skeleton.weight(owner)
        if weight is not None and (path == owner or path == weight.parameter):
            weights.setdefault(weight.identity, weight)
        else:
            kind = type(skeleton.modules[path]).__name__ if path in skeleton.modules else "parameter"
            unsupported.setdefault(kind, []).append(path)
    for kind, paths in unsupported.items():
        message = f"{kind} cannot be adapted: {listed(paths)}"
        help_text = "restrict the rule with `: Linear`, or subtract them with `except`"
        if kind == "Adapted":
            message = f"{listed(paths)}: adapted already"
            help_text = "apply all rules in one program, to a fresh model"
        diagnostics.error("SURG025", message, rule.node.pattern.span, help=help_text)
    return list(weights.values())


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


def _untied(rule: Rule, weights: list[Weight], skeleton: Skeleton, diagnostics: Diagnostics) -> list[Weight]:
    for weight in weights:
        names = [name for name in skeleton.owners[weight.identity] if name != weight.parameter]
        # one module under two paths is one module; two modules that hold one parameter are tied
        module = skeleton.modules[weight.path]
        others = [name for name in names if skeleton.modules[name.rpartition(".")[0]] is not module]
        if others and rule.alias is None:
            message = f"`{weight.parameter}` is tied to {listed(others)}"
            help_text = "add `untie` to the rule: the adapted one gets a weight of its own"
            diagnostics.error("SURG024", message, rule.node.pattern.span, help=help_text)
        if not others and rule.alias is not None:
            span = next(clause.span for clause in rule.node.clauses if isinstance(clause, nodes.Alias))
            diagnostics.error("SURG024", f"`{weight.path}` is not tied to anything", span, help="leave the word out")
    return weights
