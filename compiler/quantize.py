"""`quantize` in the model line: which weights are kept in few bits, and what cannot be asked of them.

W is what its codes stand for wherever a method says W, its starts included: those are computed from it once, matrix by
matrix. Afterwards there is `x @ W.T` and `x @ W`, and no W.
"""

from __future__ import annotations

from surgery.compiler import nodes
from surgery.compiler.algebra import telescope
from surgery.compiler.algebra.expression import Expression
from surgery.compiler.algebra.facts import dense_reading, reads_weight
from surgery.compiler.algebra.formula import MethodFormula
from surgery.compiler.algebra.previous import leaves
from surgery.compiler.algebra.sources import calibrated
from surgery.compiler.diagnostics import Diagnostics
from surgery.compiler.kernels.quantized_linear import PACKED, stored_bytes
from surgery.compiler.plan import Plan, QuantizedPlan, WholeParameter
from surgery.compiler.program import Program
from surgery.compiler.settings import place
from surgery.compiler.skeleton import Skeleton
from surgery.compiler.weights import Weight

CLASSES = ("Linear", "Conv1D")
STAYS = "W is quantized, and any other way would form it"  # why a site runs as a branch


def candidates(program: Program, skeleton: Skeleton) -> dict[int, Weight]:
    """The linear layers of the repeated blocks by their identity, none without `quantize`; trained ones among them.

    Those that the model's class keeps in float32 are none of them.
    """
    if program.model is None or program.model.quantize is None:
        return {}
    # What transformers says of modules that are not for few bits: T5 casts rows to the dtype of such a weight.
    kept = set(getattr(skeleton.model, "_keep_in_fp32_modules", None) or ())
    found = {}
    for path in skeleton.modules:
        if kept & set(path.split(".")):
            continue
        weight = skeleton.weight(path) if skeleton.block(path) else None
        if not isinstance(weight, Weight) or weight.layout.module_class not in CLASSES:
            continue
        if all(skeleton.block(name) for name in skeleton.owners[weight.identity]):
            found[weight.identity] = weight
    return found


def quantized_plan(
    program: Program, skeleton: Skeleton, trained: tuple[WholeParameter, ...], diagnostics: Diagnostics
) -> QuantizedPlan | None:
    """What the setting does to a model; SURG031 where it could do nothing, or not all of it."""
    if program.model is None or program.model.quantize is None:
        return None
    kind, span = program.model.quantize, _setting(program).span
    whole = {id(skeleton.parameters[parameter.name]) for parameter in trained}
    weights = [weight for key, weight in candidates(program, skeleton).items() if key not in whole]
    if not weights:
        model = type(skeleton.model).__name__
        message = f"there is nothing to quantize: {model} has no frozen linear layer in a list of repeated blocks"
        diagnostics.error("SURG031", message, span, help="leave `quantize` out")
    for weight in weights:
        if kind == "nf4" and weight.inputs % PACKED:
            message = f"`{weight.path}` has {weight.inputs} columns, and nf4 packs two of them into a byte"
            diagnostics.error("SURG031", message, span, help="write `quantize = int8`")
            break
    numbers = [weight.outputs * weight.inputs for weight in weights]
    return QuantizedPlan(
        kind=kind, weights=tuple(name for weight in weights for name in skeleton.owners[weight.identity]),
        numbers=sum(numbers), bytes=sum(stored_bytes(kind, weight.outputs, weight.inputs) for weight in weights),
        dense_bytes=sum(
            count * skeleton.parameters[weight.parameter].element_size()
            for count, weight in zip(numbers, weights, strict=True)
        ),
        place=place(span),
    )  # fmt: skip


def _setting(program: Program) -> nodes.Setting:
    """The line that asks for it."""
    (model,) = [item for item in program.tree.items if isinstance(item, nodes.Model)]
    return next(line for line in model.settings if line.name == "quantize")


def why_refused(formula: MethodFormula, update: str) -> tuple[str, Expression | None] | None:
    """Why a method cannot work on a quantized W, for people, and the part of it that does not; None if it can.

    `update` is how the rule asks for an event that moves W to be read.
    """
    if formula.corrections:
        return "it changes W at the start, and few bits would not hold the change", formula.corrections[0].value
    if formula.moves_base:
        open_end = telescope.why_not(formula)
        if update == "literal" or open_end is not None:
            otherwise = (
                "; without `update = literal` their sum is taken in closed form"
                if open_end is None
                else f", and their sum has no closed form: {open_end}"
            )
            return f"its steps move W, and few bits would not hold what they add{otherwise}", None
    read = [formula.expression, *(term.input for term in formula.terms)]
    read += [] if formula.penalty is None else [formula.penalty]
    if (part := next(filter(None, map(dense_reading, read)), None)) is not None:
        return "it reads W other than through `x @ W.T`, so W would have to be there as a matrix", part
    changes = [change for event in formula.events for change in event.changes if change.target != "W"]
    if (part := next((change.value for change in changes if reads_weight(change.value)), None)) is not None:
        return "an event reads W, which would have to be there as a matrix", part
    if any(name == "W" for name, _ in leaves(formula).values()):
        return "it reads the W of an earlier block, which would have to be there as a matrix", None
    if "gradient" in calibrated(formula):
        return "a start reads grad(W), and there is no gradient to what is kept in few bits", None
    return None


def as_dense(plan: Plan) -> Plan:
    """The same plan over the model's own weights, which are dense."""
    sites = tuple(site.model_copy(update={"quantized": False}) for site in plan.sites)
    return plan.model_copy(update={"sites": sites, "quantized": None})
