"""The events of a spec as Python: a function for what happens at one site, and its calls in the step's clock."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from surgery.compiler.algebra.quantity import CLOCK
from surgery.compiler.emit.body import WIDTH, Body, wrapped
from surgery.compiler.emit.naming import Names, snake
from surgery.compiler.emit.tables import names_list
from surgery.compiler.events import KEPT, EventProgram

PHASES = ("start", "before forward", "penalty", "after backward", "after step")
IMPORTS = {"add_products": "from surgery.compiler.kernels.moved_weights import add_products"}
FACTORS = ("lefts", "rights", "lefts_before", "rights_before")  # what the graph of a program with a `move` gives

KEEP = f'''@torch.no_grad()
def keep(weights: Weights, names: list[str]) -> None:
    """Copy tensors beside themselves: `NAME{KEPT}` is what NAME was at the start of the step."""
    torch._foreach_copy_([weights[f"{{name}}{KEPT}"] for name in names], [weights[name] for name in names])
'''

PENALTY = '''def penalty(weights: Weights, step: int, steps: int) -> Tensor:
    """What the methods add to the loss of optimizer step `step`, summed over their sites."""
    parts: list[Tensor] = []
{}    return torch.stack(parts).sum()
'''


@dataclass
class EventSource:
    """Functions and tables of all events, what is kept at a step's start, and the calls of each phase."""

    definitions: list[str] = field(default_factory=list)
    keeps: list[str] = field(default_factory=list)
    calls: dict[str, list[str]] = field(default_factory=lambda: {phase: [] for phase in PHASES})


def event_source(programs: Sequence[EventProgram]) -> EventSource:
    """Python for the events; programs that differ in their sites alone (their sizes, for example) are one."""
    taken = {"site", "keep", "penalty", "parts", "gradients", "train_step", "weights", "key", *IMPORTS}
    source, names = EventSource(), Names(frozenset(taken))
    functions: dict[str, str] = {}
    tables: dict[tuple[str, ...], str] = {}
    merged: dict[tuple[object, ...], tuple[EventProgram, str, dict[str, str], list[str]]] = {}
    for program in programs:
        body = "" if program.move and _stored(program.graph) else _function_body(program)
        for own, keys in _sites(program):
            same = (program.phase, program.condition, program.comment, program.move, body, tuple(keys.items()))
            merged.setdefault(same, (program, body, keys, []))[3].extend(own)
    if any(program.kept for program in programs):
        source.definitions.append(KEEP)
    for program, body, keys, sites in merged.values():
        if body and body not in functions:
            functions[body] = names.claim(snake(program.function))
            source.definitions.append(body.replace("NAME", functions[body], 1))
        table = tuple(sites)
        if table not in tables:
            tables[table] = names.claim("SITES")
            first, *rest = names_list(table)
            source.definitions.append("\n".join([f"{tables[table]} = {first}", *rest]) + "\n")
        _add_calls(source, program, functions.get(body, ""), tables[table], keys)
    if source.calls["penalty"]:
        source.definitions.append(PENALTY.format("".join(f"    {line}\n" for line in source.calls["penalty"])))
    return source


def _add_calls(source: EventSource, program: EventProgram, function: str, table: str, keys: dict[str, str]) -> None:
    head = [] if program.condition == "True" else [f"if {program.condition}:"]
    indent = "    " if head else ""
    weights = {placeholder: f"weights[{_key(name)}]" for placeholder, name in keys.items()}
    arguments = [weights.get(name, name) for name in _parameters(program.graph)]
    call = f"{function}({', '.join(arguments)})"
    if program.phase == "penalty":
        lines = _listed(f"parts += [{call} for site in {table}]", call, table)
    elif program.move:
        lines = _move(program, call if function else "", table, weights)
    else:
        lines = [f"for site in {table}:", *(f"    {line}" for line in wrapped(call))]
    source.calls[program.phase] += [*wrapped_comment(program.comment), *head, *(f"{indent}{line}" for line in lines)]
    kept = [name.removesuffix(KEPT) for name in keys.values() if name.endswith(KEPT)]
    lines = [*head, *(f"{indent}{line}" for line in _keep(kept, table))]
    if kept and source.keeps[-len(lines) :] != lines:
        source.keeps += lines


def _keep(kept: Sequence[str], table: str) -> list[str]:
    """Calls that keep tensors of all sites, by their names with `{site}` in them, and those that sites share."""
    own = [name.removeprefix("{site}.") for name in kept if name.startswith("{site}.")]
    shared = [f'"{name}"' for name in kept if not name.startswith("{site}.")]
    lines = []
    if len(own) == 1:
        lines += wrapped(f'keep(weights, [f"{{site}}.{own[0]}" for site in {table}])')
    elif own:
        among = ", ".join(f'"{name}"' for name in own)
        lines += wrapped(f'keep(weights, [f"{{site}}.{{name}}" for site in {table} for name in ({among})])')
    return lines + (wrapped(f"keep(weights, [{', '.join(shared)}])") if shared else [])


def _move(program: EventProgram, call: str, table: str, weights: dict[str, str]) -> list[str]:
    """W of all sites in one call: lists of the weights and of their factors, which `call` gives where computed."""
    assert program.move is not None
    results = _results(program.graph)
    lists = {"targets": weights["W"]}
    if program.move.source != "W":
        lists["sources"] = weights[program.move.source]
    if not call:
        lists |= {name: weights[str(node.target)] for name, node in zip(FACTORS, results, strict=False)}
    lines = [line for name, each in lists.items() for line in wrapped(f"{name} = [{each} for site in {table}]")]
    if call:
        names = ", ".join(FACTORS[: len(results)])
        lines += ["factors = [", *(f"    {line}" for line in wrapped(call)), f"    for site in {table}", "]"]
        lines.append(f"{names} = zip(*factors, strict=True)")
    options = [f"scale={program.move.scale}"]
    options += ["before=(lefts_before, rights_before)"] if len(results) == len(FACTORS) else []
    options += ["sources=sources"] if "sources" in lists else []
    options += ["transposed=True"] if program.move.transposed else []
    return [*lines, *wrapped(f"add_products(targets, lefts, rights, {', '.join(options)})")]


def _listed(whole: str, call: str, table: str) -> list[str]:
    """A list of a call's results at all sites: on one line where that fits."""
    if len(whole) <= WIDTH:
        return [whole]
    return [whole[: whole.index("[") + 1], *(f"    {line}" for line in wrapped(call)), f"    for site in {table}", "]"]


def _results(graph: fx.Graph) -> tuple[fx.Node, ...]:
    (output,) = (node for node in graph.nodes if node.op == "output")
    return tuple(output.args[0] or ())


def _parameters(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "placeholder"]


def _stored(graph: fx.Graph) -> bool:
    """Whether a graph gives what it takes and computes nothing."""
    return all(node.op == "placeholder" for node in _results(graph))


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


def _function_body(program: EventProgram) -> str:
    names, results = Names(), _results(program.graph)
    known = {
        node: name if (name := str(node.target)) in CLOCK else names.claim(name)
        for node in program.graph.nodes
        if node.op == "placeholder"
    }
    parameters = ", ".join(f"{name}: {'int' if name in CLOCK else 'Tensor'}" for name in known.values())
    first = next(name for name in known.values() if name not in CLOCK)
    body = Body(known, lambda name: f'weights["{name}"]', names, set(results))
    body.write([node for node in program.graph.nodes if node.op not in ("placeholder", "output")])
    if program.phase == "penalty":
        lines = [*_head(parameters, "Tensor"), '    """What one site adds to the loss."""']
    else:
        lines = ["@torch.no_grad()", *_head(parameters, "tuple[Tensor, ...]" if results else "None")]
        what = "The factors of what the event adds to W at one site" if results else "What the event does at one site"
        lines.append(f'    """{what}; `..._before` is the value at the start of the step."""')
    if body.uses_device:
        lines.append(f"    device = {first}.device")
    if results:
        body.lines.append(f"return {', '.join(known[node] for node in results)}")
    return "\n".join([*lines, *(f"    {line}" for line in body.lines)]) + "\n"


def _head(parameters: str, result: str) -> list[str]:
    first, *rest = wrapped(f"def NAME({parameters})")
    if not rest and len(f"{first} -> {result}:") > WIDTH:
        first, rest = "def NAME(", [f"    {parameters},", ")"]
    lines = [first, *rest]
    return [*lines[:-1], f"{lines[-1]} -> {result}:"]
