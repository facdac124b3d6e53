"""Products of weights as the command line says them: `layers.2 @ layers.1 = layers.0`, by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from surgery.compiler import nodes
from surgery.compiler.diagnostics import Diagnostics, did_you_mean, fail
from surgery.compiler.pattern import ancestry, matches, parse_pattern
from surgery.compiler.select import matched
from surgery.compiler.span import Source, Span

OPTION = "--group"


@dataclass(frozen=True)
class Factor:
    """A weight in a product, or its transpose."""

    name: str
    transposed: bool = False

    def __str__(self) -> str:
        return self.name.removesuffix(".weight") + ".T" * self.transposed


@dataclass(frozen=True)
class Product:
    """`base` weights of which the product is compared with that of `target` ones, each from left to right."""

    base: tuple[Factor, ...]
    target: tuple[Factor, ...]
    span: Span

    def __str__(self) -> str:
        left, right = (" @ ".join(map(str, side)) for side in (self.base, self.target))
        return left if self.base == self.target else f"{left} = {right}"


def natural(name: str) -> list[tuple[int, str]]:
    """A key by which block 2 comes before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def is_meant(pattern: str, name: str, option: str) -> bool:
    """Whether a pattern means a weight, by its own name or its module's."""
    parts = parse_pattern(_pattern(pattern, option))
    return matches(parts, name) or matches(parts, name.removesuffix(".weight"))


def check_pattern(pattern: str, names: Iterable[str], option: str) -> None:
    """Raise SURG020 for a pattern that means no weight, SURG021 for one of its parts; the nearest name is said."""
    names, node, found = list(names), _pattern(pattern, option), Diagnostics()
    paths = {path: path for name in names for path in reversed(ancestry(name))}
    matched(node, paths, found)
    found.raise_errors()
    if not any(is_meant(pattern, name, option) for name in names):
        help = f"did you mean `{pattern}.**`?"
        raise fail("SURG020", f"`{pattern}` is of modules that have no weight of their own", node.span, help=help)


def _pattern(text: str, option: str) -> nodes.Pattern:
    return nodes.Pattern(text, span=Span(Source(option, text), 0, len(text)))


def products_of(text: str, base: Iterable[str], target: Iterable[str]) -> list[Product]:
    """All products that a text means, of weights of these names: the n-th one is of the n-th match of each factor.

    Raises at the place in the text: SURG001 for what is no product, SURG020 for a pattern without a match, SURG022
    where patterns match another number of weights.
    """
    whole = Span(Source(OPTION, text), 0, len(text))
    sides = _split(whole, "=")
    if len(sides) > 2:
        help = 'write the weights as they are multiplied: "layers.1 @ layers.0", or "layers.1 @ layers.0 = layers.0"'
        raise fail("SURG001", "this is no product of weights", sides[2], help=help)
    known = [sorted(names, key=natural) for names in (base, target)]
    models = ("base", "target")
    found = [_side(*given) for given in zip([sides[0], sides[-1]], known, models, strict=True)]
    counts = [(len(factor), span) for side in found for factor, span in side]
    for count, span in counts:
        if count != counts[0][0]:
            message = f"`{span.text}` matches {count} weights, and `{counts[0][1].text}` {counts[0][0]}"
            raise fail("SURG022", message, span, help="each pattern of a product has to match as many")
    lefts, rights = ([[factor[number] for factor, _ in side] for number in range(counts[0][0])] for side in found)
    return [Product(tuple(one), tuple(other), whole) for one, other in zip(lefts, rights, strict=True)]


def _side(side: Span, names: Sequence[str], model: str) -> list[tuple[list[Factor], Span]]:
    """The weights that each factor of one side matches, in the order of the blocks."""
    found = []
    for span in _split(side, "@"):
        pattern = span.text.removesuffix(".T")
        parts = parse_pattern(nodes.Pattern(pattern, span=span))
        alike = [name for name in names if matches(parts, name) or matches(parts, name.removesuffix(".weight"))]
        if not alike:
            help = did_you_mean(pattern, [name.removesuffix(".weight") for name in names])
            raise fail("SURG020", f"`{pattern}` matches no weight of the {model}", span, help=help)
        found.append(([Factor(name, span.text.endswith(".T")) for name in alike], span))
    return found


def _split(whole: Span, sign: str) -> list[Span]:
    """The parts between a sign, without the spaces around them; none is empty."""
    found, start = [], whole.start
    for part in whole.text.split(sign):
        begun = start + len(part) - len(part.lstrip())
        found.append(Span(whole.source, begun, begun + len(part.strip())))
        if not part.strip():
            here = Span(whole.source, start, start + max(1, len(part)))
            raise fail("SURG001", "a weight is missing here", here, help="`A @ B` multiplies two weights")
        start += len(part) + len(sign)
    return found
