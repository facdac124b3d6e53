"""The numbered log of the passes: what each took and gave, line by line, for whoever listens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from surgery.compiler.adapted import AdaptedSite
from surgery.compiler.graph import Graph
from surgery.compiler.nodes import Tree
from surgery.compiler.plan import Plan, way_text
from surgery.compiler.program import Program

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Let `listener` have a line for every pass that runs inside."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def logged(module: ModuleType, *arguments: Any) -> Any:
    """What the pass gives, and its line in the log: `7  p7_lower  0.21 s  36 uses by branch; 412 nodes to 590`."""
    listener = _listener.get()
    if listener is None:
        return module.run(*arguments)
    start = time.perf_counter()
    result = module.run(*arguments)
    seconds = time.perf_counter() - start
    name = module.__name__.rpartition(".")[2]
    listener(f"{name[1 : name.index('_')]}  {name:<11}  {seconds:6.2f} s  {_said(arguments, result)}")
    return result


def _said(arguments: tuple[Any, ...], result: Any) -> str:
    """In a few words what a pass gave."""
    if isinstance(result, Tree):
        return _counted(type(item).__name__.lower() for item in result.items)
    if isinstance(result, Program):
        return _plural(len(result.rules), "rule")
    if isinstance(result, Plan):
        if all(site.candidates for site in result.sites):
            return _counted(way_text(site.strategy, site.operation) for site in result.sites)
        return f"{_plural(len(result.sites), 'site')} of {_plural(len(result.formulas), 'equation')}"
    if isinstance(result, Graph):
        before = next((value for value in arguments if isinstance(value, Graph)), None)
        if before is None:
            return _plural(len(result.module.graph.nodes), "node")
        uses, left = _uses(before), _uses(result)
        done = _counted(uses) if uses else _plural(len(left), "use") if left else ", ".join(result.log) or "nothing"
        return f"{done}; {len(before.module.graph.nodes):,} nodes to {len(result.module.graph.nodes):,}"
    return _plural(str(result).count("\n"), "line")


def _uses(graph: Graph) -> list[str]:
    """How each use of a weight is to be run, while it is a node of the algebra."""
    found = (module.adaptation for module in graph.module.modules() if isinstance(module, AdaptedSite))
    return [way_text(adaptation.strategy, adaptation.operation) for adaptation in found]


def _counted(entries: Iterable[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in Counter(entries).items())


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
