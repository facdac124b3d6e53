"""What the spec's optimizer needs to know of the methods: the products that their equations read, by tensors' keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from surgery.compiler import nodes
from surgery.compiler.algebra.instance import instance
from surgery.compiler.algebra.products import reading
from surgery.compiler.diagnostics import Diagnostics, Note
from surgery.compiler.plan import FactorsPlan, Plan, Site, TensorPlan
from surgery.compiler.program import Program
from surgery.compiler.span import Span
from surgery.optimizers import NEEDS, OPTIMIZERS, Need

COUNTS: Mapping[Need, tuple[int, int]] = {"pairs": (2, 2), "half_pairs": (2, 1), "triples": (3, 3)}  # factors, trained


@dataclass
class _Known:
    """A product of some tensors, by their keys: where it is read first, and with which numbers in front."""

    site: Site
    turned: tuple[bool, ...]
    scales: set[float] = field(default_factory=set)


class Products:
    """The products that all equations of a plan read, as an optimizer may take them."""

    def __init__(self, plan: Plan) -> None:
        self.tensors: dict[str, TensorPlan] = {one.key: one for site in plan.sites for one in site.tensors}
        self._known: dict[tuple[str, ...], _Known] = {}
        self._alone: set[str] = set()
        self._of_site: dict[str, list[tuple[str, ...]]] = {}
        for site in plan.sites:
            self._read(plan, site)
        readers: dict[str, int] = {}
        for keys in self._known:
            for key in keys:
                readers[key] = readers.get(key, 0) + 1
        self._shared = {key for key, count in readers.items() if count > 1}

    def _read(self, plan: Plan, site: Site) -> None:
        found = reading(instance(plan, site.formula))
        keys = {tensor.name: tensor.key for tensor in site.tensors} | site.earlier
        self._alone |= {keys[name] for name in found.alone if name in keys}
        for leaves, scales in found.products.items():
            product = tuple(keys[name] for name, _ in leaves)
            turned = tuple(turned for _, turned in leaves)
            self._known.setdefault(product, _Known(site, turned)).scales.update(scales)
            self._of_site.setdefault(site.path, []).append(product)

    def of(self, site: Site, need: Need) -> Iterator[FactorsPlan]:
        """The products of one kind that a site reads, and that nothing reads in another way."""
        if need not in COUNTS:
            return
        for keys in self._of_site.get(site.path, []):
            known = self._known[keys]
            trained = [self.tensors[key].role == "train" for key in keys if key in self.tensors]
            whole = len(set(keys)) == len(keys) and not set(keys) & (self._alone | self._shared)
            if (len(keys), sum(trained)) != COUNTS[need] or not whole or len(known.scales) != 1:
                continue
            if need == "triples" and not self._orthogonal(keys):
                continue
            yield FactorsPlan(site=known.site.path, tensors=keys, turned=known.turned, scale=next(iter(known.scales)))

    def _orthogonal(self, keys: tuple[str, ...]) -> bool:
        return all(self.tensors[key].start == "orthogonal" for key in (keys[0], keys[-1]))


def factors(program: Program, plan: Plan, diagnostics: Diagnostics) -> tuple[FactorsPlan, ...]:
    """The factors that the optimizer of a plan's `step` moves, each product once.

    SURG039 at rules whose method has none; those at rest in a block need none.
    """
    kind = OPTIMIZERS[plan.step.optimizer.name]
    if kind.needs == "jacobian":
        _check_outputs(program, plan, diagnostics)
        _check_penalties(program, plan, diagnostics)
    if kind.needs is None or kind.needs not in COUNTS:
        return ()
    products = Products(plan)
    found: dict[tuple[str, ...], FactorsPlan] = {}
    refused: dict[int, None] = {}
    rests = set(plan.step.frozen)
    moving = [
        site for site in plan.sites
        if any(one.role == "train" for one in site.tensors) or not any(one.key in rests for one in site.tensors)
    ]  # fmt: skip
    for site in moving:
        of_site = list(products.of(site, kind.needs))
        found |= {one.tensors: found.get(one.tensors, one) for one in of_site}
        if not of_site:
            refused[site.rule] = None
    where = setting(program, "optimizer", plan.step.number)
    notes = [Note("the optimizer", where)] if where is not None else []
    if rests and (node := program.moving[plan.step.number].node) is not None:
        notes.append(Note("the block", node.span))
    for rule in refused:
        none = "has none that moves in this block" if rests else "has none"
        message = f"`{kind.name}` needs {NEEDS[kind.needs]}; `{program.rules[rule].method.name}` {none}"
        fits = f"these fit all rules: {', '.join(fitting(moving, products))}"
        diagnostics.error("SURG039", message, program.rules[rule].method_span, notes=notes, help=fits)
    if not moving:
        none = "what rules adapt rests in this block" if plan.sites else "no rule adapts anything"
        message = f"`{kind.name}` needs {NEEDS[kind.needs]}; {none}"
        diagnostics.error("SURG039", message, where, help="adapt some weights, or take adamw or sgd")
    return tuple(found.values())


def _check_outputs(program: Program, plan: Plan, diagnostics: Diagnostics) -> None:
    """Each output of a row is a backward pass: as many as a vocabulary has are out of the question."""
    name, tokens = plan.step.optimizer.name, plan.step.optimizer.options["tokens"]
    task = plan.model.task if plan.step.loss == "auto" else plan.step.loss
    where = setting(program, "optimizer", plan.step.number)
    if task == "causal_lm" and not tokens:
        message = f"`{name}` needs {NEEDS['jacobian']}; a language model's are as many as its tokens are"
        help_text = f"name the tokens that are labels, by their numbers: {name}(tokens = [3, 17])"
        diagnostics.error("SURG039", message, where, help=help_text)
    elif task in ("masked_lm", "seq2seq_lm", "token_classification", "feature_extraction", "output"):
        message = f"`{name}` needs {NEEDS['jacobian']}; {task} has others"
        diagnostics.error("SURG039", message, where, help="take it for classification or regression, or adamw or sgd")
    elif tokens and task != "causal_lm":
        message = "`tokens` are the label tokens of a language model, and this is none"
        diagnostics.error("SURG039", message, where, help="leave `tokens` out")


def _check_penalties(program: Program, plan: Plan, diagnostics: Diagnostics) -> None:
    """What such an optimizer reads are outputs: a penalty would move nothing."""
    for rule in {site.rule: None for site in plan.sites if instance(plan, site.formula).penalty is not None}:
        message = f"`{plan.step.optimizer.name}` reads outputs and no loss, so the `penalty` would do nothing"
        where = setting(program, "optimizer", plan.step.number)
        notes = [Note("the optimizer", where)] if where is not None else []
        diagnostics.error("SURG039", message, program.rules[rule].method_span, notes=notes, help="take adamw or sgd")


def fitting(sites: Sequence[Site], products: Products) -> list[str]:
    """The optimizers whose needs each of these sites meets."""
    fits: dict[Need | None, bool] = {None: True, "jacobian": False}  # whose outputs are few, its own check says
    for need in COUNTS:
        fits[need] = all(any(True for _ in products.of(site, need)) for site in sites)
    return sorted(name for name, kind in OPTIMIZERS.items() if fits[kind.needs])


def setting(program: Program, name: str, number: int = 0) -> Span | None:
    """Where a `step` block sets something, or the block before it from which it is taken."""
    blocks = [said.node for said in program.moving[: number + 1] if said.node is not None]
    lines = [line for block in reversed(blocks) for line in block.settings]
    return next((line.value.span for line in lines if isinstance(line, nodes.Setting) and line.name == name), None)
