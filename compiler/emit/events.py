"""The events of a spec as Python: a function for what happens at one site, and its calls in the step's clock."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from surgery.compiler.emit.body import WIDTH, Body, wrapped
from surgery.compiler.emit.naming import Names, snake
from surgery.compiler.emit.tables import names_list
from surgery.compiler.events import EventProgram

PHASES = ("start", "before forward", "after backward", "after step")


@dataclass
class EventSource:
    """Functions and tables of all events, what is kept at a step's start, and the calls of each phase."""

    definitions: list[str] = field(default_factory=list)
    keeps: list[str] = field(default_factory=list)
    calls: dict[str, list[str]] = field(default_factory=lambda: {phase: [] for phase in PHASES})


def event_source(programs: Sequence[EventProgram]) -> EventSource:
    """Python for the events; programs that differ in their sites alone (their sizes, for example) are one."""
    source, names = EventSource(), Names(frozenset({"kept", "site", "gradients", "train_step", "weights", "key"}))
    functions: dict[str, str] = {}
    tables: dict[tuple[str, ...], str] = {}
    merged: dict[tuple[object, ...], tuple[EventProgram, str, dict[str, str], list[str]]] = {}
    for program in programs:
        body = _function_body(program.graph)
        for own, keys in _sites(program):
            same = (program.phase, program.condition, program.comment, program.keep, body, tuple(keys.items()))
            merged.setdefault(same, (program, body, keys, []))[3].extend(own)
    for program, body, keys, sites in merged.values():
        if body not in functions:
            functions[body] = names.claim(snake(program.function))
            source.definitions.append(body.replace("NAME", functions[body], 1))
        table = tuple(sites)
        if table not in tables:
            tables[table] = names.claim("SITES")
            first, *rest = names_list(table)
            source.definitions.append("\n".join([f"{tables[table]} = {first}", *rest]) + "\n")
        _add_calls(source, program, functions[body], tables[table], keys)
    return source


def _add_calls(source: EventSource, program: EventProgram, function: str, table: str, keys: dict[str, str]) -> None:
    head = [] if program.condition == "True" else [f"if {program.condition}:"]
    indent = "    " if head else ""
    arguments = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
            kept = name.removesuffix("_before")
            if name not in keys and kept in program.keep:
                arguments.append(f"kept[{_key(keys[kept])}]")
            else:
                arguments.append(f"weights[{_key(keys[name])}]")
    loop = f"{indent}for site in {table}:"
    calls = source.calls[program.phase]
    calls += wrapped_comment(program.comment) + head + [loop]
    calls += [f"{indent}    {line}" for line in wrapped(f"{function}({', '.join(arguments)})")]
    lines = [*head, loop]
    for name in program.keep:
        key = _key(keys[name])
        lines.append(f"{indent}    kept[{key}] = weights[{key}].detach().clone()")
    if program.keep and source.keeps[-len(lines) :] != lines:
        source.keeps += lines


def wrapped_comment(text: str) -> list[str]:
    """A comment on as many lines as it needs."""
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH - 6)]


def _key(pattern: str) -> str:
    return f'f"{pattern}"' if "{site}" in pattern else f'"{pattern}"'


def _sites(program: EventProgram) -> list[tuple[list[str], dict[str, str]]]:
    """What names the sites, and per placeholder the weight's name with `{site}` in it.

    Sites that read other shared tensors than the first ones do are apart: those are written by their full names.
    """
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for site in program.sites:
        stem = _stem(site)
        below = f"{stem}."
        keys = tuple((placeholder, name.replace(below, "{site}.", 1) if name.startswith(below) else name)
                     for placeholder, name in site.items())  # fmt: skip
        found.setdefault(keys, []).append(stem)
    return [(names, dict(keys)) for keys, names in found.items()]


def _stem(site: dict[str, str]) -> str:
    """The module path that most of a site's names lie below; shared tensors lie elsewhere."""
    paths = [name.rpartition(".")[0] for name in site.values()]
    own = [path for path in paths if not path.startswith("shared.")] or paths
    shortest = min(own, key=len)
    if all(f"{path}.".startswith(f"{shortest}.") for path in own):  # tensors of a composition lie one level below
        return shortest
    return max(dict.fromkeys(own), key=own.count)


def _function_body(graph: fx.Graph) -> str:
    names = Names()
    known = {node: names.claim(str(node.target)) for node in graph.nodes if node.op == "placeholder"}
    parameters = ", ".join(f"{name}: Tensor" for name in known.values())
    first = next(iter(known.values()))
    body = Body(known, lambda name: f'weights["{name}"]', names, set())
    body.write([node for node in graph.nodes if node.op not in ("placeholder", "output")])
    lines = ["@torch.no_grad()", *_head(parameters)]
    lines.append('    """What the event does at one site; `..._before` is the value at the start of the step."""')
    if body.uses_device:
        lines.append(f"    device = {first}.device")
    return "\n".join([*lines, *(f"    {line}" for line in body.lines)]) + "\n"


def _head(parameters: str) -> list[str]:
    lines = wrapped(f"def NAME({parameters})")
    return [*lines[:-1], f"{lines[-1]} -> None:"]
