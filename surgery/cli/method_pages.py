"""The pages of the method library in Markdown: one per method and a table of all, from what `surgery methods` says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.compiler import nodes, p1_parse
from surgery.compiler.source import read
from surgery.method_info import SIZE, MethodInfo

HEAD = f"""# The method library

Every file of `surgery/methods`, written by `make docs`. The last column counts the numbers trained at one Linear of
{SIZE} x {SIZE} with the defaults, a number that the data tell as 1; what many sites share counts whole.

| method | what it is | equation | start | rank | merges | LoRA | trained |
|---|---|---|---|---|---|---|---:|
"""


@dataclass(frozen=True)
class Use:
    """A spec that uses a method: its path as a link and the comment at its head."""

    link: str
    name: str
    comment: str


def sentences(method: MethodInfo) -> list[str]:
    """What is proved of a method, one sentence each."""
    bound = method.rank_bound
    facts = [
        "the model is unchanged at the start" if method.identity_at_start else "the model is changed at the start",
        f"the rank of the change is at most `{bound}`"
        if bound
        else "no bound below the sizes of W is proved for the rank of the change",
        "merges into W exactly" if method.merges else f"does not merge into W: {method.merge_reason}",
        "exports as an ordinary LoRA" if method.exports_as_lora else "",
        "zeros of W stay zeros" if method.keeps_zeros else "",
        f"moves W itself{_sum(method)}" if method.moves_base else "",
        "reads W as a dense matrix: no quantized base" if method.needs_dense_weight else "",
        "needs calibration data" if method.needs_calibration else "",
    ]
    return [f"{fact[0].upper()}{fact[1:]}." for fact in facts if fact]


def _sum(method: MethodInfo) -> str:
    """What is known of the sum of the steps that move W; nothing where only the start does."""
    if method.open_reason is None:
        return ""
    reason = f"does not telescope: {method.open_reason}" if method.open_reason else "telescopes"
    return f", by steps whose sum {reason}"


def pages(methods: Sequence[MethodInfo], folder: Path, specs: Path) -> dict[str, str]:
    """The text of every page by its file's name: `README.md`, and `NAME.md` of each method, to be put into `folder`.

    `specs` is a folder of `.surg` files: each method's page links to those that use it. Raises `SurgError` for a spec
    that cannot be read.
    """
    uses = _uses(folder, specs)
    rows = "".join(_row(method) for method in methods)
    found = {f"{method.name}.md": _page(method, uses.get(method.name, [])) for method in methods}
    return {"README.md": HEAD + rows, **found}


def _row(method: MethodInfo) -> str:
    cells = (
        f"[{method.name}]({method.name}.md)", method.what, "<br>".join(map(_code, method.equation.split("; "))),
        "W" if method.identity_at_start else "changed", _code(method.rank_bound) if method.rank_bound else "full",
        "yes" if method.merges else "no", "yes" if method.exports_as_lora else "no", f"{method.trained:,}",
    )  # fmt: skip
    return _line(cells)


def _page(method: MethodInfo, uses: Sequence[Use]) -> str:
    about = method.source.partition(": ")[2]
    parts = [f"# {method.title}\n\n{about[0].upper()}{about[1:]}\n\n```surg\n{_body(method.text)}```\n\n"]
    parts += ["## What it computes\n\n", *(f"* {_code(part)}\n" for part in method.equation.split("; "))]
    parts += ["\n## What is proved\n\n", *(f"* {sentence}\n" for sentence in sentences(method))]
    if method.parameters:
        parts += ["\n## Parameters\n\n", _line(("name", "kind", "default")), _line(("---",) * 3)]
        parts += [_line(_parameter(text)) for text in method.parameters]
    size = f"numbers at {SIZE} x {SIZE}"
    parts += ["\n## Tensors\n\n", _line(("name", "role", "start", "shared by", size)), _line(("---",) * 4 + ("---:",))]
    parts += [
        _line((tensor.name, tensor.role, _code(tensor.start), tensor.shared, f"{tensor.numbers:,}"))
        for tensor in method.tensors
    ]
    parts += [f"\n{method.trained:,} of these numbers are trained.\n"]
    if uses:
        parts += ["\n## Specs\n\n", *(f"* [{use.name}]({use.link}): {use.comment}\n" for use in uses)]
    return "".join(parts)


def _body(text: str) -> str:
    return text[text.index("method ") :]  # the header is the page's first paragraph


def _parameter(text: str) -> tuple[str, str, str]:
    name, _, rest = text.partition(": ")
    kind, _, default = rest.partition(" = ")
    return name, kind, _code(default) if default else "must be given"


def _code(text: str) -> str:
    return f"`{text}`"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _uses(folder: Path, specs: Path) -> Mapping[str, list[Use]]:
    found: dict[str, list[Use]] = {}
    for path in sorted(specs.glob("*.surg")):
        items = p1_parse.run(read(path)).items
        comment = " ".join(line.lstrip("# ") for line in items[0].comments) if items else ""
        link = os.path.relpath(path, folder).replace(os.sep, "/")
        rules = [clause.value for item in items if isinstance(item, nodes.Adapt) for clause in item.clauses
                 if isinstance(clause, nodes.With)]  # fmt: skip
        for method in sorted(set().union(*map(calls, rules))):
            found.setdefault(method, []).append(Use(link, path.name, comment))
    return found


def calls(node: nodes.Node) -> set[str]:
    """The names of all functions and methods that are called in a part of the tree."""
    found = {node.function} if isinstance(node, nodes.Call) else set()
    for value in vars(node).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, nodes.Node):
                found |= calls(part)
    return found
