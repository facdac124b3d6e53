"""The events of a spec as Python: a function for what happens at one site, and its calls in the step's clock."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from surgery.compiler.algebra.expression import BEFORE
from surgery.compiler.algebra.quantity import CLOCK
from surgery.compiler.emit.body import WIDTH, Body, wrapped
from surgery.compiler.emit.naming import OF_A_STEP, Names, snake
from surgery.compiler.emit.tables import names_list
from surgery.compiler.event_program import GRAD, KEPT, EventProgram

PHASES = ("start", "before forward", "penalty", "after backward", "after step")
IMPORTS = {
    "add_products": "from surgery.compiler.kernels.moved_weights import add_products",
    "cosine_up": "from surgery.compiler.kernels.schedules import cosine_up",
    "cubic_budget": "from surgery.compiler.kernels.schedules import cubic_budget",
    "forget": "from surgery.runtime.draws import forget",
    "keep_top": "from surgery.compiler.kernels.across_sites import keep_top",
    "late_budget": "from surgery.compiler.kernels.schedules import late_budget",
    "quantile": "from surgery.compiler.kernels.across_sites import quantile",
    "redraw": "from surgery.runtime.draws import redraw",
}
FACTORS = ("lefts", "rights", "lefts_before", "rights_before")  # what the graph of a program with a `move` gives

KEEP = f'''@torch.no_grad()
def keep(weights: Weights, names: list[str]) -> None:
    """Copy tensors beside themselves: `NAME{KEPT}` is what NAME was at the start of the step."""
    torch._foreach_copy_([weights[f"{{name}}{KEPT}"] for name in names], [weights[name] for name in names])
'''

GRADIENT = '''def gradient(tensor: Tensor) -> Tensor:
    """The gradient of the loss; zeros where the loss did not read the tensor."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
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
    last: tuple[str, str, str] | None = None  # phase, condition and comment of the last call

    def behind(self, lines: Sequence[str]) -> EventSource:
        """The same behind some statements after the backward."""
        phase = "after backward"
        return replace(self, calls={**self.calls, phase: [*lines, *self.calls[phase]]})


@dataclass
class _Call:
    """What is done by one function at sites that differ in their names alone."""

    program: EventProgram
    body: str
    keys: dict[str, str]  # by placeholder the weight's name with `{site}` in it
    sites: list[str]
    function: str = ""
    table: str = ""

    @property
    def weights(self) -> dict[str, str]:
        """By placeholder, what stands for it in the step."""
        return {placeholder: _weight(name) for placeholder, name in self.keys.items()}

    @property
    def text(self) -> str:
        """The call of the function at `site`."""
        arguments = [self.weights.get(name, name) for name in _parameters(self.program.graph)]
        return f"{self.function}({', '.join(arguments)})"

    def every(self, placeholder: str) -> str:
        """A list of a tensor of all sites."""
        return f"[{self.weights[placeholder]} for site in {self.table}]"


def event_source(programs: Sequence[EventProgram]) -> EventSource:
    """Python for the events; programs that differ in their sites alone (their sizes, for example) are one."""
    source, names = EventSource(), Names(OF_A_STEP | {"site", "parts", "key", "first", "count"})
    functions: dict[str, str] = {}
    tables: dict[tuple[str, ...], str] = {}
    merged: dict[tuple[object, ...], _Call] = {}
    for program in programs:
        body = "" if _stored(program.graph) else _function_body(program)
        for own, keys in _sites(program):
            what = replace(program, function="", sites=())  # that of its graph is its body
            same = (what, body, tuple(keys.items()))
            merged.setdefault(same, _Call(program, body, keys, [])).sites.extend(own)
    if any(program.kept for program in programs):
        source.definitions.append(KEEP)
    if any(name.endswith(GRAD) for program in programs for site in program.sites for name in site.values()):
        source.definitions.append(GRADIENT)
    for call in merged.values():
        if call.body and call.body not in functions:
            functions[call.body] = names.claim(snake(call.program.function))
            source.definitions.append(call.body.replace("NAME", functions[call.body], 1))
        table = tuple(call.sites)
        if table not in tables and not call.program.fills:
            tables[table] = names.claim("SITES")
            first, *rest = names_list(table)
            source.definitions.append("\n".join([f"{tables[table]} = {first}", *rest]) + "\n")
        call.function, call.table = functions.get(call.body, ""), tables.get(table, "")
    calls = list(merged.values())
    for call in calls:
        joined = call.program.joined
        together = [other for other in calls if other.program.joined == joined] if joined else [call]
        if together[0] is call:  # the others are in its call
            _add_calls(source, call, together)
    if source.calls["penalty"]:
        source.definitions.append(PENALTY.format("".join(f"    {line}\n" for line in source.calls["penalty"])))
    return source


def _add_calls(source: EventSource, call: _Call, together: Sequence[_Call]) -> None:
    program = call.program
    head = [] if program.condition == "True" else [f"if {program.condition}:"]
    indent = "    " if head else ""
    if program.phase == "penalty":
        lines = _listed("parts += ", call)
    elif program.move:
        lines = _move(call)
    elif program.across:
        lines = _across(together)
    elif program.redraws:
        lines = _redraw(call)
    elif program.fills:
        lines = [f"{_weight(program.sites[0][program.writes[0]])}.fill_({program.fills})"]
    else:
        lines = [f"for site in {call.table}:", *(f"    {line}" for line in wrapped(call.text))]
        lines += wrapped(f"forget(optimizer, {call.every(program.writes[0])})") if program.forgets else []
    happening = (program.phase, program.condition, program.comment)
    if happening != source.last:  # statements of one event stand below one condition
        source.calls[program.phase] += [*wrapped_comment(program.comment), *head]
        source.last = happening
    source.calls[program.phase] += [f"{indent}{line}" for line in lines]
    kept = [name.removesuffix(KEPT) for name in call.keys.values() if name.endswith(KEPT)]
    lines = [*head, *(f"{indent}{line}" for line in _keep(kept, call.table))]
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


def _move(call: _Call) -> list[str]:
    """W of all sites in one call: lists of the weights and of their factors, which a function gives where computed."""
    program, results = call.program, _results(call.program.graph)
    assert program.move is not None
    lists = {"targets": call.weights["W"]}
    if program.move.source != "W":
        lists["sources"] = call.weights[program.move.source]
    if not call.function:
        lists |= {name: call.weights[str(node.target)] for name, node in zip(FACTORS, results, strict=False)}
    lines = [line for name, each in lists.items() for line in wrapped(f"{name} = [{each} for site in {call.table}]")]
    if call.function:
        names = ", ".join(FACTORS[: len(results)])
        lines += ["factors = [", *(f"    {line}" for line in wrapped(call.text)), f"    for site in {call.table}", "]"]
        lines.append(f"{names} = zip(*factors, strict=True)")
    options = [f"scale={program.move.scale}" + (f" * ({program.move.times})" if program.move.times else "")]
    options += ["before=(lefts_before, rights_before)"] if len(results) == len(FACTORS) else []
    options += ["sources=sources"] if "sources" in lists else []
    options += ["transposed=True"] if program.move.transposed else []
    return [*lines, *wrapped(f"add_products(targets, lefts, rights, {', '.join(options)})")]


def _across(calls: Sequence[_Call]) -> list[str]:
    """A state at all sites, of the values at all of them: sites of other functions are in the same call."""
    program, (name,) = calls[0].program, calls[0].program.writes
    values = []
    for call in calls:
        (value,) = _results(call.program.graph)
        values.append(f"[{call.text} for site in {call.table}]" if call.function else call.every(str(value.target)))
    target = calls[0].weights[name]
    if "{site}" in calls[0].keys[name]:
        target = " + ".join(call.every(name) for call in calls)
    number = max((call.program.number for call in calls), key=len)  # of sites with experts it says so
    return wrapped(f"{program.across}({target}, {' + '.join(values)}, {number})")


def _redraw(call: _Call) -> list[str]:
    """Tensors of all sites begun anew."""
    program, redraws = call.program, call.program.redraws
    assert redraws is not None
    names = f"[{_key(call.keys[program.writes[0]])} for site in {call.table}]"
    start = f'"{redraws.start}", {list(redraws.numbers)}, {redraws.axes}'
    return wrapped(f"redraw(weights, optimizer, {names}, {start}, {redraws.seed}, step)")


def _listed(target: str, call: _Call) -> list[str]:
    """A list of what a function gives at all sites: on one line where that fits."""
    whole = f"{target}[{call.text} for site in {call.table}]"
    if len(whole) <= WIDTH:
        return [whole]
    return [f"{target}[", *(f"    {line}" for line in wrapped(call.text)), f"    for site in {call.table}", "]"]


def _results(graph: fx.Graph) -> tuple[fx.Node, ...]:
    (output,) = (node for node in graph.nodes if node.op == "output")
    return tuple(output.args[0] or ())


def _parameters(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "placeholder"]


def _stored(graph: fx.Graph) -> bool:
    """Whether a graph computes nothing, but gives what it takes."""
    return all(node.op in ("placeholder", "output") for node in graph.nodes)


def wrapped_comment(text: str) -> list[str]:
    """A comment on as many lines as it needs."""
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH - 6)]


def _weight(name: str) -> str:
    """What stands for a tensor by its name, or for its gradient."""
    if name.endswith(GRAD):
        return f"gradient({_weight(name.removesuffix(GRAD))})"
    return f"weights[{_key(name)}]"


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
    paths = [name.removesuffix(GRAD).rpartition(".")[0] for name in site.values()]
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
        lines = [
            "@torch.no_grad()",
            *_head(parameters, ("Tensor" if program.across else "tuple[Tensor, ...]") if results else "None"),
        ]
        lines.append(f'    """{_what(program)}."""')
    if body.uses_device:
        lines.append(f"    device = {first}.device")
    if results:
        body.lines.append(f"return {', '.join(known[node] for node in results)}")
    return "\n".join([*lines, *(f"    {line}" for line in body.lines)]) + "\n"


def _what(program: EventProgram) -> str:
    what = "What the event does at one site"
    if program.move:
        what = "The factors of what the event adds to W at one site"
    if program.across:
        what = "What the event compares at all sites"
    before = any(name.endswith(BEFORE) for name in _parameters(program.graph))
    return f"{what}; `..._before` is the value at the start of the step" if before else what


def _head(parameters: str, result: str) -> list[str]:
    first, *rest = wrapped(f"def NAME({parameters})")
    if not rest and len(f"{first} -> {result}:") > WIDTH:
        first, rest = "def NAME(", [f"    {parameters},", ")"]
    lines = [first, *rest]
    return [*lines[:-1], f"{lines[-1]} -> {result}:"]
