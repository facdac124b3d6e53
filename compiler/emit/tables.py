"""Lists of names as Python source whose length does not grow with the number of blocks."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.compiler.emit.body import WIDTH


def names_list(names: Sequence[str]) -> list[str]:
    """Lines of a list display of all `names`; those of repeated blocks are spelt once, with the blocks' numbers."""
    lines = ["["]
    for stack, entries in _stacks(names).items():
        if stack is None:
            lines += _rows([f'"{name}"' for name in entries[""]], "    ")
            continue
        for inner, numbers in _alike(entries).items():
            indices = f"range({numbers[0]}, {numbers[-1] + 1})" if numbers[0] else f"range({numbers[-1] + 1})"
            if list(range(numbers[0], numbers[-1] + 1)) != numbers:
                indices = str(tuple(numbers)) if len(numbers) > 1 else f"({numbers[0]},)"
            lines += [
                "    *(",
                f'        f"{stack}.{{index}}.{{name}}"',
                f"        for index in {indices}",
                "        for name in (",
            ]
            lines += [*_rows([f'"{name}"' for name in inner], "            "), "        )", "    ),"]
    return [*lines, "]"]


def _stacks(names: Sequence[str]) -> dict[str | None, dict[str, list[str]]]:
    """Names by the list of modules that they lie in, then by the number of the entry; None holds the rest."""
    found: dict[str | None, dict[str, list[str]]] = {}
    for name in names:
        parts = name.split(".")
        place = next((number for number, part in enumerate(parts[:-1]) if number and part.isdecimal()), None)
        if place is None:
            found.setdefault(None, {}).setdefault("", []).append(name)
        else:
            entries = found.setdefault(".".join(parts[:place]), {})
            entries.setdefault(parts[place], []).append(".".join(parts[place + 1 :]))
    return found


def _alike(entries: dict[str, list[str]]) -> dict[tuple[str, ...], list[int]]:
    found: dict[tuple[str, ...], list[int]] = {}
    for index, inner in entries.items():
        found.setdefault(tuple(inner), []).append(int(index))
    return found


def _rows(texts: Sequence[str], indent: str) -> list[str]:
    rows, row = [], indent
    for text in texts:
        if row != indent and len(row) + len(text) + 2 > WIDTH:
            rows.append(row.rstrip())
            row = indent
        row += f"{text}, "
    return [*rows, row.rstrip()] if row != indent else rows
