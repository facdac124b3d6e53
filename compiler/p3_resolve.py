"""Program + skeleton -> Plan: sites, sizes, numbers; on the meta device, nothing is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from surgery.compiler import active, blocks, earlier, factors, nodes, plan_checks, position
from surgery.compiler.algebra import affine, compose, instance, telescope
from surgery.compiler.algebra.formula import MethodFormula, TensorFormula
from surgery.compiler.algebra.names import COORDINATES, names_in
from surgery.compiler.algebra.proved import prove
from surgery.compiler.algebra.quantity import Quantity, whole_of
from surgery.compiler.diagnostics import Diagnostics, Note, SurgError
from surgery.compiler.fits import why_unfit
from surgery.compiler.numbers import Numbers
from surgery.compiler.plan import (
    HALF,
    EventPlan,
    Facts,
    Formula,
    LaterPlan,
    MeasuredPlan,
    ModelPlan,
    Plan,
    QuantizedPlan,
    Site,
    TensorPlan,
    Totals,
)  # fmt: skip
from surgery.compiler.printer import show
from surgery.compiler.program import Program, Rule
from surgery.compiler.quantize import candidates, quantized_plan, why_refused
from surgery.compiler.select import Selection, listed, select_sites
from surgery.compiler.settings import place
from surgery.compiler.skeleton import Skeleton
from surgery.compiler.span import Span
from surgery.compiler.trained import Trained, trained
from surgery.compiler.weights import Weight

Update = Literal["none", "literal", "telescope"]
Built = tuple[str, MethodFormula, Facts, Update]  # the formula's key in the plan, its algebra, its facts, its reading
UNKNOWN_TOKENS = 4096  # planned tokens where neither the data nor the batch says


def run(
    program: Program, model: nn.Module, examples: Mapping[str, Tensor] | None = None, saved: Plan | None = None,
    measured: tuple[MeasuredPlan, ...] | None = (),
) -> Plan:  # fmt: skip
    """Resolve a program against a model (on any device, also meta); raises `SurgError` with all that does not fit.

    `examples` are inputs of the model's forward: they tell the sizes of outputs where the model itself does not; so
    does the `saved` plan of a run of it. `measured` are numbers of the data, also those of the `saved` plan; None: a
    draft, in which each is 1, and which says what is to be measured.
    """
    known = {site.path: site.shape[0] for site in saved.sites if not site.parameter} if saved else {}
    skeleton = Skeleton(model, examples, program.model.task if program.model else None, known)
    diagnostics = Diagnostics()
    claimed: dict[int, Selection] = {}
    resolver = _Resolver(program, skeleton, diagnostics, frozenset(candidates(program, skeleton)))
    numbers = Numbers(program, skeleton, diagnostics, saved.measured if saved else measured)
    selections = [select_sites(rule, skeleton, diagnostics) for rule in program.rules]
    for selection in selections:
        _reject_overlap(selection, claimed, diagnostics)
    groups = position.joined(program.rules)
    for index, (rule, selection) in enumerate(zip(program.rules, selections, strict=True)):
        joined = [weight for other in groups[index] for weight in selections[other].weights]
        resolver.rule(index, rule, selection.weights, joined, numbers)
    found = trained(program, skeleton, claimed, resolver.sites, diagnostics)
    if not program.rules and not found.whole and not diagnostics.errors:
        diagnostics.error("SURG020", "the program adapts nothing and trains nothing", program.tree.span)
    plan_checks.check_length(program, skeleton, diagnostics)
    plan_checks.check_packed(program, skeleton, diagnostics)
    diagnostics.raise_errors()
    quantized = quantized_plan(program, skeleton, found.whole, diagnostics)
    diagnostics.raise_errors()
    plan = resolver.plan(found, quantized)
    products = []
    for block in plan.blocks:
        plan_checks.check_half(program, block, diagnostics)
        products.append(factors.factors(program, block, diagnostics))
        plan_checks.check_events(program, block, diagnostics)
        plan_checks.check_resting(program, block, diagnostics)
        active.check_optimizer(program, block, diagnostics)
    plan_checks.check_frozen(program, skeleton, plan, diagnostics)
    resting = active.active(program, plan, diagnostics)
    diagnostics.raise_errors()
    later = tuple(LaterPlan(step=step, factors=own) for step, own in zip(found.steps, products, strict=True))[1:]
    more = {
        "recomputed": blocks.recomputed(plan, skeleton), "factors": products[0], "later": later, "active": resting,
        "measured": numbers.plans,
    }  # fmt: skip
    return plan.model_copy(update=more)


def _reject_overlap(selection: Selection, claimed: dict[int, Selection], diagnostics: Diagnostics) -> None:
    for weight in selection.weights:
        first = claimed.setdefault(weight.identity, selection)
        if first is not selection:
            other = Note("the other rule", first.rule.node.pattern.span)
            message = f"`{weight.path}` is claimed by two rules"
            diagnostics.error(
                "SURG023", message, selection.rule.node.pattern.span, notes=[other], help="subtract it with `except`"
            )
            return


@dataclass(frozen=True)
class _Unfit:
    """Why a method cannot adapt some weights, what of it does not fit them, and what to do."""

    reason: str
    help: str
    cause: Span | None = None


@dataclass
class _Resolver:
    """Collects the sites of all rules; formulas are elaborated once per method, size and coordinates."""

    program: Program
    skeleton: Skeleton
    diagnostics: Diagnostics
    quantized: frozenset[int]  # identities of the weights that are kept in few bits
    sites: list[Site] = field(default_factory=list)
    formulas: dict[str, Formula] = field(default_factory=dict)
    events: list[EventPlan] = field(default_factory=list)
    shared: dict[str, tuple[TensorFormula, str]] = field(default_factory=dict)  # key: the tensor at its first site
    _differing: set[tuple[str, str]] = field(default_factory=set)  # shared tensors that differ, said once
    _built: dict[str, Built | None] = field(default_factory=dict)
    _unfit: dict[str, _Unfit] = field(default_factory=dict)  # why a formula does not fit its kind of weight
    _refused: dict[tuple[int, _Unfit], list[str]] = field(default_factory=dict)  # by rule and reason, the paths

    def rule(self, index: int, rule: Rule, weights: list[Weight], joined: list[Weight], numbers: Numbers) -> None:
        """Add the sites of one rule; coordinates count over `joined`, the weights of all rules that share with it."""
        positions = position.positions(joined, self.skeleton)
        before = earlier.earlier_paths(rule, weights, self.skeleton)
        for weight, known in numbers.rules(rule, weights):
            self.site(index, known, weight, positions[weight.identity], before.get(weight.path, {}))
        for (number, unfit), paths in self._refused.items():
            if number == index:
                message = f"`{rule.method.name}` cannot adapt {listed(paths)}: {unfit.reason}"
                notes = [Note("the weights", rule.node.pattern.span)]
                notes += [] if unfit.cause is None else [Note("what does not fit", unfit.cause)]
                self.diagnostics.error("SURG025", message, rule.method_span, notes=notes, help=unfit.help)

    def site(self, index: int, rule: Rule, weight: Weight, where: position.Position, before: earlier.Paths) -> None:
        """Add one site, unless something about it is wrong."""
        built = self.formula(index, rule, weight, {**where.coordinates, **earlier.coordinates(before)})
        if built is None:
            return
        key, formula, proved, update = built
        tensors = tuple(self.tensor(index, tensor, weight, where) for tensor in formula.tensors)
        try:
            far = earlier.earlier_tensors(formula, (weight.outputs, weight.inputs), rule, before, self.sites)
        except SurgError as error:
            self.diagnostics.found += error.diagnostics
            return
        first = [tensor for tensor in tensors if self.shared.get(tensor.key, (None, weight.path))[1] == weight.path]
        self.sites.append(
            Site(
                path=weight.path, parameter=weight.parameter, module_class=weight.layout.module_class, kind=where.kind,
                layer=where.layer,
                shape=(weight.outputs, weight.inputs), dtype=weight.dtype, untied=rule.alias == "untie",
                transposed=weight.layout.transposed, experts=weight.layout.experts, kernel=weight.layout.kernel,
                bias=weight.bias, rule=index,
                formula=key, method=_call(rule), rank=formula.rank, tensors=tensors,
                earlier=far[0], earlier_inputs=far[1],
                trainable=sum(tensor.numbers for tensor in first if tensor.role == "train"),
                frozen=sum(tensor.numbers for tensor in first if tensor.role != "train"),
                update=update, quantized=weight.identity in self.quantized, facts=proved, place=place(rule.node.span),
                strategy="" if rule.strategy == "auto" else rule.strategy,
            )
        )  # fmt: skip

    def formula(self, index: int, rule: Rule, weight: Weight, coordinates: dict[str, int]) -> Built | None:
        """The rule's method at the size of a weight; what does not fit is reported once for all sites of that size."""
        reads = self._coordinates(rule)
        record = Formula(
            method=rule.method.name, arguments=dict(rule.arguments), outputs=weight.outputs, inputs=weight.inputs,
            coordinates={name: size for name, size in coordinates.items() if name in reads or "earlier" in name},
            equation="",
        )  # fmt: skip
        few_bits = weight.identity in self.quantized
        stored = f"{weight.layout.module_class} {weight.bias} {weight.dtype} {few_bits}"
        known = f"{index} {stored} {record.model_dump_json()}"
        if known not in self._built:
            found = self._build(rule, weight, record)
            if found is not None and (unfit := self._why_unfit(found[0], rule, weight)):
                self._unfit[known] = unfit
                found = None
            self._built[known] = None if found is None else self._register(rule, weight, record, *found)
        if known in self._unfit:
            self._refused.setdefault((index, self._unfit[known]), []).append(weight.path)
        return self._built[known]

    def _why_unfit(self, formula: MethodFormula, rule: Rule, weight: Weight) -> _Unfit | None:
        """Why a formula cannot adapt a weight as the model holds it."""
        advice = "adapt them with another method, or subtract them with `except`"
        if reason := why_unfit(formula, weight, tied=rule.alias == "tie"):
            return _Unfit(reason, advice)
        refused = why_refused(formula, rule.update) if weight.identity in self.quantized else None
        if refused is None:
            return None
        reason, part = refused
        return _Unfit(reason, f"leave `quantize` out, or {advice}", None if part is None else part.span)

    def _register(self, rule: Rule, weight: Weight, record: Formula, formula: MethodFormula, proved: Facts) -> Built:
        """Choose the reading of a formula, and enter it and its events into the plan unless it is there."""
        update: Update = "none"
        if formula.moves_base:
            lossy = weight.dtype in HALF or weight.identity in self.quantized
            wanted = rule.update == "telescope" or (rule.update == "auto" and lossy)
            closed = telescope.why_not(formula) is None
            update = "telescope" if wanted and closed else "literal"
        if update == "telescope":
            record = record.model_copy(update={"telescope": True})
            formula = telescope.telescoped(formula)
        elif update == "literal" and weight.dtype in HALF and closed:  # what one step adds would be lost there
            record = record.model_copy(update={"from_start": True})
            formula = telescope.from_start(formula)
        known = record.coordinates.items()
        read = {name: size for name, size in known if "earlier" not in name or name in formula.coordinates}
        record = record.model_copy(update={"equation": formula.equation, "coordinates": read})
        key = next((key for key, other in self.formulas.items() if other == record), None)
        if key is None:
            key = f"{formula.name}_{len(self.formulas)}"
            self.formulas[key] = record
            self._events(key, rule, formula, update)
        return key, formula, proved, update

    def _coordinates(self, rule: Rule) -> list[str]:
        joined = [rule.method.expression] if isinstance(rule.method, compose.Composed) else []
        return sorted(COORDINATES & set().union(*map(names_in, [*rule.method.statements, *joined])))

    def _build(self, rule: Rule, weight: Weight, record: Formula) -> tuple[MethodFormula, Facts] | None:
        least = min(weight.outputs, weight.inputs)
        where = Note(f"at `{weight.path}` [{weight.outputs}, {weight.inputs}]", rule.node.pattern.span)
        rank = next((rank for rank in compose.ranks(rule.method, record.arguments) if not 1 <= rank <= least), None)
        if rank is not None and (rank < 1 or not self._projects(rule, record, rank)):
            message = f"rank {rank} is out of range: 1 to {least} here"
            self.diagnostics.error("SURG026", message, rule.method_span, notes=[where])
            return None
        try:
            formula = instance.build(rule.method, record)
        except SurgError as error:
            used = Note("used by this rule", rule.method_span)
            said = {(found.code, found.span) for found in self.diagnostics.found}
            for found in error.diagnostics:
                if found.code == "SURG028":  # the requirement is right, the rule is not
                    required = [Note("the requirement", found.span), where]
                    self.diagnostics.error(found.code, found.message, rule.method_span, notes=required)
                    continue
                if (found.code, found.span) in said:  # said for another size already
                    continue
                self.diagnostics.error(
                    found.code, found.message, found.span, notes=[*found.notes, where, used], help=found.help
                )
            return None
        proved = prove(formula)
        self._check_update(rule, weight, formula)
        rank_bound = None if proved.rank_bound is None else whole_of(proved.rank_bound)
        known = {**vars(proved), "rank_bound": rank_bound}
        if not weight.parameter:
            known |= {"merges": False, "merge_reason": "the module has no weight to merge into"}
        elif proved.merges and not weight.bias and affine.effective(formula, biased=False).offset is not None:
            reason = f"it needs a bias, and this {weight.layout.module_class} has none"
            known |= {"merges": False, "merge_reason": reason}
        return formula, Facts(**known)

    def _projects(self, rule: Rule, record: Formula, rank: int) -> bool:
        """Whether all matrices of that rank are frozen: a random projection may be wider than a weight (VeRA)."""
        try:
            tensors = instance.build(rule.method, record).tensors
        except SurgError:
            return False
        of_rank = [tensor for tensor in tensors if len(tensor.shape) > 1 and Quantity.of(rank) in tensor.shape]
        return bool(of_rank) and all(tensor.role == "frozen" for tensor in of_rank)

    def _check_update(self, rule: Rule, weight: Weight, formula: MethodFormula) -> None:
        if not formula.moves_base:
            return
        reason = telescope.why_not(formula)
        where = next((clause.span for clause in rule.node.clauses if isinstance(clause, nodes.With)), None)
        if rule.update == "telescope" and reason:
            self.diagnostics.error("SURG032", f"`{formula.name}` does not telescope: {reason}", where)
        elif reason and weight.dtype in HALF:
            message = f"moving W in place in {weight.dtype} loses every update below half a unit of its last place"
            help_text = f"its sum has no closed form: {reason}; use dtype = float32"
            self.diagnostics.error("SURG032", message, where, help=help_text)

    def _events(self, key: str, rule: Rule, formula: MethodFormula, update: str) -> None:
        original = [event for event in rule.method.statements if isinstance(event, nodes.Event)]
        for event in original:
            moves = any(isinstance(change, nodes.Change) and change.target == "W" for change in event.changes)
            masks = any(call.function == "keep_top" for call in compose.calls(event))
            kind = "once" if event.phase == "at" else update if moves else "mask" if masks else "assign"
            phase = "after step" if event.phase == "every" else f"{event.phase} {event.point}"
            self.events.append(
                EventPlan(formula=key, text=show(event), phase=phase, update=kind, place=place(event.span))  # type: ignore[arg-type]
            )

    def tensor(self, index: int, tensor: TensorFormula, weight: Weight, where: position.Position) -> TensorPlan:
        """A tensor at a site; a shared one gets the key of its group and must have one shape there."""
        shape = tuple(whole_of(size) for size in tensor.shape)
        if weight.layout.experts and not tensor.shared_by:
            shape = (weight.layout.experts, *shape)
        key = f"{weight.home}.{tensor.name}"
        if tensor.shared_by:
            group = tensor.shared_as or f"rule{index}"
            part = {"model": "", "layer": f".layer{where.layer}", "kind": f".{where.kind}"}[tensor.shared_by]
            own = tensor.name.rpartition(".")[2] if tensor.shared_as else tensor.name  # one tensor for all that say so
            key = f"shared.{group}{part}.{own}"
            self._check_shared(group, key, tensor, shape, weight)
        return TensorPlan(
            name=tensor.name, key=key, role=tensor.role, shape=shape,
            dtype=tensor.dtype or self._dtype(weight),
            start=tensor.start.text, numbers=math.prod(shape), lr=tensor.lr, weight_decay=tensor.weight_decay,
        )  # fmt: skip

    def _check_shared(
        self, group: str, key: str, tensor: TensorFormula, shape: tuple[int, ...], weight: Weight
    ) -> None:
        """Sites that share a tensor agree on all of it: what another site says of it would do nothing."""
        known, first = self.shared.setdefault(key, (tensor, weight.path))
        known_shape = tuple(whole_of(size) for size in known.shape)
        if (group, tensor.name) in self._differing:
            return
        if known_shape != shape:
            clash = f"{list(known_shape)} at `{first}` and {list(shape)} at `{weight.path}`"
            message = f"`{tensor.name}` is shared, but would be {clash}"
            advice = "share it `by kind`, or give it the sizes `max_in` and `max_out` and slice it: `A[:, 0:in]`"
            self.diagnostics.error("SURG005", message, tensor.span, help=advice)
        elif _definition(known) != _definition(tensor):
            message = f"`{tensor.name}` is shared, but defined differently at `{first}` and at `{weight.path}`"
            advice = "all that share it need the same role, start, lr and weight_decay"
            notes = [Note("the first one", known.span)]
            self.diagnostics.error("SURG009", message, tensor.span, notes=notes, help=advice)
        else:
            return
        self._differing.add((group, tensor.name))

    def _dtype(self, weight: Weight) -> str:
        asked = self.program.step.adapter_dtype
        wider = torch.promote_types(torch.float32, getattr(torch, weight.dtype))
        return asked or str(wider).removeprefix("torch.")

    def plan(self, found: Trained, quantized: QuantizedPlan | None) -> Plan:
        """Everything that was found, with its totals."""
        program, skeleton = self.program, self.skeleton
        trainable = sum(site.trainable for site in found.sites) + sum(entry.numbers for entry in found.whole)
        model = program.model or ModelPlan(source="given", name=type(skeleton.model).__name__)
        if model.task is None and skeleton.task is not None:
            task, labels = skeleton.task
            model = model.model_copy(update={"task": task, "labels": labels})
        own = {item.name for item in program.tree.items if isinstance(item, nodes.Method)}
        borrowed = [method for rule in program.rules for method in rule.methods if method.name not in own]
        step, data = found.steps[0], program.data
        if data is not None and skeleton.positions is not None:
            data = data.model_copy(update={"max_length": min(data.max_length, skeleton.positions)})
        rows = step.micro_batch or step.batch
        return Plan(
            spec=program.source.text, file=program.source.name,
            library={method.span.source.name: method.span.source.text for method in borrowed if method.span},
            model=model.model_copy(
                update={
                    "architecture": type(skeleton.model).__name__, "parameters": skeleton.numbers,
                    "fingerprint": skeleton.fingerprint,
                }
            ),
            sites=found.sites, formulas=self.formulas, trained=found.whole, step=step, data=data,
            later=tuple(LaterPlan(step=one) for one in found.steps[1:]),
            events=tuple(self.events), tokens=rows * data.max_length if data else UNKNOWN_TOKENS,
            quantized=quantized,
            totals=Totals(
                sites=len(found.sites), trainable=trainable, frozen=sum(site.frozen for site in found.sites),
                model=skeleton.numbers, share=trainable / max(1, skeleton.numbers),
            ),
        )  # fmt: skip


def _definition(tensor: TensorFormula) -> tuple[object, ...]:
    """What sites that share a tensor have to agree on, beside its shape."""
    return tensor.role, tensor.start.text, tensor.start.arguments, tensor.lr, tensor.weight_decay


def _call(rule: Rule) -> str:
    if isinstance(rule.method, compose.Composed):
        return rule.method.name
    arguments = ", ".join(
        f'{name} = "{value}"'
        if isinstance(value, str)
        else f"{name} = {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in rule.arguments.items()
    )
    return f"{rule.method.name}({arguments})"
