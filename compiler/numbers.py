"""Numbers of the data at each site: what a rule becomes in the block of a weight, and what is still to be measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from surgery.compiler.algebra.measured import Gain, gain
from surgery.compiler.bound import with_numbers
from surgery.compiler.diagnostics import Diagnostics, Note, SurgError
from surgery.compiler.plan import MeasuredPlan
from surgery.compiler.program import Program, Rule
from surgery.compiler.select import listed
from surgery.compiler.settings import place
from surgery.compiler.skeleton import Skeleton
from surgery.compiler.weights import Weight


@dataclass
class Numbers:
    """The numbers of the data that a program asks for; None: a draft, in which each is 1."""

    program: Program
    skeleton: Skeleton
    diagnostics: Diagnostics
    known: tuple[MeasuredPlan, ...] | None
    _drafted: dict[Gain, MeasuredPlan] = field(default_factory=dict)

    @property
    def plans(self) -> tuple[MeasuredPlan, ...]:
        """The numbers for the plan; in a draft, what there is to measure."""
        return tuple(self._drafted.values()) if self.known is None else self.known

    def rules(self, rule: Rule, weights: Sequence[Weight]) -> Iterator[tuple[Weight, Rule]]:
        """The weights of a rule, each with the rule as it is in its block; none where something is wrong."""
        if not rule.asks:
            yield from ((weight, rule) for weight in weights)
            return
        outside = [weight.path for weight in weights if self.skeleton.block(weight.path) is None]
        if outside:
            where = f"{listed(outside)} {'is' if len(outside) == 1 else 'are'} in no block"
            message = f"{where}, and `{rule.asks[0]}` is a number of a block"
            advice = "give these weights to a rule of their own, with a number"
            notes = [Note("the weights", rule.node.pattern.span)]
            self.diagnostics.error("SURG033", message, rule.asks[0].span, notes=notes, help=advice)
            return
        made: dict[tuple[int, ...], Rule] = {}
        for weight in weights:
            values = {asked: self._value(asked, rule, weight) for asked in rule.asks}
            lacking = [asked for asked, value in values.items() if value is None]
            if lacking:
                self._missing(lacking[0], rule)
                return
            found = {asked: value for asked, value in values.items() if value is not None}
            key = tuple(found.values())
            if key not in made:
                try:
                    made[key] = with_numbers(rule, self.program.methods, found)
                except SurgError as error:
                    self.diagnostics.found += error.diagnostics
                    return
            yield weight, made[key]

    def _value(self, asked: Gain, rule: Rule, weight: Weight) -> int | None:
        """The number at a weight; None where it was not measured."""
        block = self.skeleton.block(weight.path)
        assert block is not None
        path = f"{block[0]}.{block[1]}"
        if self.known is None:
            said = self._drafted.get(asked) or MeasuredPlan(
                call=str(asked), pooling=asked.pooling, estimator=asked.estimator, blocks={},
                place=place(rule.method_span),
            )  # fmt: skip
            self._drafted[asked] = said.model_copy(update={"blocks": {**said.blocks, path: (0.0, 0.0)}})
            return gain(0.0, 0.0)
        found = next((one for one in self.known if one.call == str(asked) and path in one.blocks), None)
        return None if found is None else gain(*found.blocks[path])

    def _missing(self, asked: Gain, rule: Rule) -> None:
        message = f"`{asked}` is measured on calibration data, and there is none"
        help_text = (
            "name rows in a data block (`calibrate = 1000` of them), or in Python give "
            "`calibration=[batch, ...]`; `surgery.apply` takes a saved run, which has the numbers"
        )
        inside = asked.span is not None and asked.span.file == self.program.source.name
        notes = [] if inside else [Note("asked for by this rule", rule.method_span)]
        self.diagnostics.error("SURG036", message, asked.span, notes=notes, help=help_text)
