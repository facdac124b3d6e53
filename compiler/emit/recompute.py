"""What the backward runs again, as functions of step.py: the weight of a site, or a whole site."""

from __future__ import annotations

from torch import fx

from surgery.compiler.algebra.recompute import Checkpointed, Recomputed
from surgery.compiler.emit.body import Body, wrapped
from surgery.compiler.emit.naming import OF_A_STEP, Names, snake


def recomputed_functions(module: fx.GraphModule) -> dict[str, str]:
    """Functions by name, one for sites that compute alike; the node of a call gets its name in `meta["function"]`."""
    names, found = Names(OF_A_STEP), dict[str, str]()
    for node in module.graph.nodes:
        owner = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(owner, Recomputed):
            text = _function(owner)
            if text not in found:
                found[text] = names.claim(snake(owner.name))
            node.meta["function"] = (found[text], *owner.call)
    return {name: text.replace("NAME", name, 1) for text, name in found.items()}


def _function(owner: Recomputed) -> str:
    graph, names = owner.function.graph, Names()
    known = {node: names.claim(str(node.target)) for node in graph.nodes if node.op == "placeholder"}
    parameters = ", ".join(f"{name}: Tensor" for name in known.values())
    (result,) = next(node for node in graph.nodes if node.op == "output").all_input_nodes
    body = Body(known, str, names, {result})
    end = names.claim("output" if isinstance(owner, Checkpointed) else "weight")
    body.write([node for node in graph.nodes if node.op not in ("placeholder", "output")], {result: end})
    head = wrapped(f"def NAME({parameters})")
    said = (
        "The output of a site for x; the backward runs it again."
        if isinstance(owner, Checkpointed)
        else "The weight of a site, from W as it is stored; the backward builds it again."
    )
    lines = [*head[:-1], f"{head[-1]} -> Tensor:", f'    """{said}"""']
    if body.uses_device:
        lines.append(f"    device = {next(iter(known.values()))}.device")
    start = next((number for number, line in enumerate(body.lines) if line.startswith(f"{end} = ")), None)
    if start is None:  # it is an argument itself
        body.lines.append(f"return {known[result]}")
    else:
        body.lines[start] = body.lines[start].replace(f"{end} =", "return", 1)
    return "\n".join([*lines, *(f"    {line}" for line in body.lines)]) + "\n"
