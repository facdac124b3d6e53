"""A small graph that is written by running plain torch on proxies: an event at one site, the weight of one site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from torch import fx


def identifier(name: str) -> str:
    """A tensor's name as Python may have it: those of a composition have a point."""
    return name.replace(".", "_")


def called(kernel: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a kernel gives; on proxies a node of their graph, which nothing looks into."""
    tracer = next((value.tracer for value in arguments if isinstance(value, fx.Proxy)), None)
    if tracer is None:
        return kernel(*arguments, **options)
    result = tracer.create_proxy("call_function", kernel, arguments, options)
    result.node.meta["is_wrapped"] = True  # fx reads a saved module by tracing it: it does not look in there either
    return result


class Recorder(Mapping[str, fx.Proxy]):
    """Tensors by name, each a placeholder of `graph` that appears when it is first asked for.

    Any name may be asked for; `names` are those that a reader finds by looking, first the ones that are there.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.graph = fx.Graph()
        self.inputs: dict[str, fx.Proxy] = {}
        self._names = tuple(names)
        self._tracer = fx.proxy.GraphAppendingTracer(self.graph)

    def __getitem__(self, name: str) -> fx.Proxy:
        if name not in self.inputs:
            first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
            with nullcontext() if first is None else self.graph.inserting_before(first):
                node = self.graph.placeholder(identifier(name))
            if str(node.target).islower():  # fx names the nodes of A and of a alike: an argument is called as its node
                node.target = node.name
            self.inputs[name] = fx.Proxy(node, self._tracer)
        return self.inputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names, key=lambda name: name not in self.inputs))

    def __len__(self) -> int:
        return len(self._names)

    def finish(self, result: fx.Proxy | tuple[fx.Proxy, ...] | None = None) -> fx.Graph:
        """The graph, which gives `result`."""
        self.graph.output(self._tracer.create_arg(result))
        self.graph.lint()
        return self.graph
