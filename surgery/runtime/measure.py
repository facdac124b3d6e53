"""Calibration rows to numbers that a plan waits for: the dimensions of the hidden states between a model's blocks.

The frozen model runs once over the rows, in evaluation mode and without a gradient; of each row's hidden states before
a block one point is kept. The model is left as it was.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from surgery.analysis.intrinsic_dimension import dimension_of, neighbour_ratios
from surgery.compiler import pipeline
from surgery.compiler.capture.isolate import untouched
from surgery.compiler.diagnostics import Diagnostic, SurgError, fail, render
from surgery.compiler.plan import MeasuredPlan, Plan
from surgery.compiler.program import Program
from surgery.compiler.skeleton import Skeleton
from surgery.runtime import batches as batches_of
from surgery.runtime import distributed

LEAST, FEW, ADVISED = 200, 800, 1000  # points: drawing N of them alone moves d by d / sqrt(N), 7 %, 3.5 % and 3 %
Batches = Sequence[Mapping[str, Tensor]]
Place = tuple[str, int]  # a list of n blocks, and a place in it: i is before block i, n behind the last one
Points = dict[tuple[Place, str], list[Tensor]]  # by place and pooling, `[rows, width]` of each batch


def measurements(
    program: Program, model: nn.Module, calibration: Batches | None, load: Callable[[], nn.Module] | None = None,
    *, examples: Mapping[str, Tensor] | None = None,
) -> tuple[MeasuredPlan, ...]:  # fmt: skip
    """The numbers of the data that a program asks for; a `model` without weights is loaded, only if there are some.

    Without `calibration` the rows are those of the spec's data block; where there is none either, nothing is measured,
    and resolving says what is missing. `examples` are inputs of the forward, as for resolving.
    """
    if not program.reads_data:
        return ()
    draft = pipeline.resolve(program, model, examples, measured=None)
    batches = calibration or _of_spec(draft, program)
    return measure(draft, load() if load else model, batches) if batches else ()


def _of_spec(draft: Plan, program: Program) -> list[dict[str, Tensor]]:
    """The calibration rows of the spec's own data."""
    from surgery.runtime.calibrate import calibration_batches
    from surgery.runtime.data import load_data
    from surgery.runtime.models import load_tokenizer

    if program.model is None or draft.data is None:
        return []
    check_rows(draft, draft.data.calibrate)
    data = load_data(draft, program.folder, load_tokenizer(draft.model, program.folder))
    for found in data.warnings:
        warnings.warn(render(found), stacklevel=4)
    return calibration_batches(draft, data)


def check_rows(draft: Plan, rows: int) -> None:
    """Refuse to measure a dimension on too few rows (SURG036)."""
    if draft.measured and rows < LEAST:
        message = f"`{draft.measured[0].call}` is measured on {rows} different rows of data, which are too few"
        raise fail("SURG036", message, draft.span(draft.measured[0].place), help=_advice())


def _advice() -> str:
    return (
        f"{LEAST} are the least, {ADVISED} or more are advised: write `calibrate = {ADVISED}` in the data block, "
        "or give more `calibration` batches"
    )


def measure(draft: Plan, model: nn.Module, batches: Batches) -> tuple[MeasuredPlan, ...]:
    """What the draft of a plan waits for, each number of a block measured on the rows of `batches`.

    Rows with the same inputs count once. Of several processes all have the first one's numbers. Raises SURG036 for too
    few rows, and for blocks whose input is no row of hidden states; SURG043 and SURG044 for batches that do not fit;
    SURG053 for hidden states that are not finite.
    """
    _check_model(draft, model)
    ready = list(_distinct(draft, model, batches))
    rows = sum(len(next(iter(inputs.values()))) for inputs, _ in ready)
    check_rows(draft, rows)
    points = _points(draft, model, ready)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    ratios = {key: _ratios(draft, key, parts, device) for key, parts in points.items()}
    fewest = min((len(found) for found in ratios.values()), default=rows)
    if fewest < FEW:
        message = f"a dimension is measured on {fewest} points, whose draw alone moves it by {fewest**-0.5:.0%}"
        span = draft.span(draft.measured[0].place)
        warnings.warn(render(Diagnostic("SURG036", message, span, help=_advice(), severity="warning")), stacklevel=2)
    found = []
    for one in draft.measured:

        def dimension(place: Place, one: MeasuredPlan = one) -> float:
            try:
                return dimension_of(ratios[place, one.pooling], one.estimator)
            except ValueError as error:
                message = f"the hidden states {_where(place)} have no dimension: {error}"
                raise fail("SURG036", message, draft.span(one.place)) from error

        blocks = {path: (dimension(before), dimension(after)) for path, (before, after) in _around(one).items()}
        found.append(one.model_copy(update={"rows": rows, "blocks": blocks}))
    return distributed.gathered(tuple(found))[0]  # one that differs in the last bit could round another way


def _around(one: MeasuredPlan) -> dict[str, tuple[Place, Place]]:
    """The places before and behind each block, by its path."""
    known = ((path, *path.rpartition(".")[::2]) for path in one.blocks)
    return {path: ((stack, int(index)), (stack, int(index) + 1)) for path, stack, index in known}


def _where(place: Place) -> str:
    return f"at place {place[1]} of `{place[0]}` (0: before the first block, 1: behind it)"


def _ratios(draft: Plan, key: tuple[Place, str], parts: list[Tensor], device: torch.device) -> Tensor:
    place, pooling = key
    points = torch.cat(parts)
    span = next(draft.span(one.place) for one in draft.measured if one.pooling == pooling)
    if not torch.isfinite(points).all():
        raise fail("SURG053", f"the hidden states {_where(place)} are not finite", span)
    found: Tensor = neighbour_ratios(points.to(device))
    if len(found) < LEAST:
        different = len(torch.unique(points, dim=0))
        message = f"the hidden states {_where(place)} are {different} different points of {len(points)} rows"
        help_text = f"a dimension takes {LEAST}"
        if pooling == "last":
            help_text += '; rows that end alike are one point there: take `pooling = "mean"`'
        raise fail("SURG036", message, span, help=help_text)
    return found


# --- the rows ---------------------------------------------------------------------------------------------------------


def _distinct(draft: Plan, model: nn.Module, batches: Batches) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """The inputs of each batch and its mask, without the rows that were there before."""
    known = set[bytes]()
    causal = draft.model.task == "causal_lm"
    parameters = inspect.signature(_body(model).forward).parameters
    for batch in batches:
        named = [name for name in batch if name in parameters and name != "labels"]
        if not named:
            raise fail("SURG044", f"the calibration batch holds no input of {type(model).__name__}.forward")
        given = {name: batch[name] for name in named}
        wanted = [name for name in named if not (causal and name == "attention_mask")]  # as the step reads it
        checked = batches_of.check(given, wanted, None, causal=causal)
        mask = batch.get("attention_mask")
        keys = [_key(checked, mask, row) for row in range(len(checked[wanted[0]]))]
        fresh = [row for row, key in enumerate(keys) if key not in known and key not in keys[:row]]
        known |= set(keys)
        if fresh:
            rows = torch.tensor(fresh)
            kept = {name: value.cpu()[rows] for name, value in checked.items()}
            yield kept, None if mask is None else mask.cpu()[rows]


def _key(inputs: Mapping[str, Tensor], mask: Tensor | None, row: int) -> bytes:
    """A digest of a row's inputs, padding left out."""
    digest = hashlib.sha256()
    for name, value in inputs.items():
        own = value[row].cpu()
        if mask is not None and value.shape[:2] == mask.shape:
            own = own[mask[row].cpu() != 0]
        digest.update(f"{name} {own.dtype} {tuple(own.shape)}".encode())
        digest.update(own.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


# --- the model --------------------------------------------------------------------------------------------------------


def _check_model(draft: Plan, model: nn.Module) -> None:
    """Refuse a model that cannot be run, or whose blocks do not read one kind of row."""
    call, span = draft.measured[0].call, draft.span(draft.measured[0].place)
    if any(parameter.is_meta for parameter in model.parameters()):
        message = f"`{call}` is measured with the model's weights, and this model has none"
        raise fail("SURG036", message, span, help="give a model that is loaded")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        message = f"`{call}` of a model with an encoder and a decoder is not built yet"
        raise fail("SURG008", message, span, help="give its rules a number")


def _body(model: nn.Module) -> Any:
    """The model without its task's head, whose logits nobody reads here."""
    return model.base_model if isinstance(getattr(model, "base_model_prefix", None), str) else model


def _points(draft: Plan, model: nn.Module, batches: Sequence[tuple[dict[str, Tensor], Tensor | None]]) -> Points:
    """One forward per batch, watched at the places that are measured."""
    watch = _Watch(draft, Skeleton(model))
    body = _body(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    options = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    with untouched(model), torch.no_grad(), ExitStack() as hooks:
        model.eval()
        watch.attach(hooks)
        for inputs, mask in batches:
            watch.mask = mask if mask is None else mask.to(device)
            body(**{name: value.to(device) for name, value in inputs.items()}, **options)
            watch.check_order()
    return watch.points


class _Watch:
    """Hooks before each block and behind the last one, which keep a point of each row."""

    def __init__(self, draft: Plan, skeleton: Skeleton) -> None:
        self.draft, self.skeleton = draft, skeleton
        self.mask: Tensor | None = None
        self.points: Points = {}
        for one in draft.measured:
            for places in _around(one).values():
                self.points |= {(place, one.pooling): [] for place in places}
        self.stacks = {stack: self._length(stack) for stack in dict.fromkeys(place[0] for place, _ in self.points)}
        self._run: dict[str, list[int]] = {stack: [] for stack in self.stacks}

    def _length(self, stack: str) -> int:
        return len(list(self.skeleton.modules[stack].children()))

    def attach(self, hooks: ExitStack) -> None:
        """Watch the blocks of every list until `hooks` are closed."""
        for stack, length in self.stacks.items():
            for index in range(length):
                block = self.skeleton.modules[f"{stack}.{index}"]
                hooks.callback(block.register_forward_pre_hook(self._before(stack, index), with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(self._behind(stack, length)).remove)

    def _before(self, stack: str, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._run[stack].append(index)
            self._keep((stack, index), [*given, named.get("hidden_states"), *named.values()])

        return hook

    def _behind(self, stack: str, length: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            self._keep((stack, length), [output] if isinstance(output, Tensor) else list(output))

        return hook

    def check_order(self) -> None:
        """A block's output is the next one's input only where they run once each, one after the other."""
        for stack, order in self._run.items():
            if order != list(range(self.stacks[stack])):
                message = f"the blocks of `{stack}` run in the order {order[:8]}, not each once behind the one before"
                raise self._refused((stack, 0), message)
            order.clear()

    def _keep(self, place: Place, values: Sequence[Any]) -> None:
        poolings = [pooling for known, pooling in self.points if known == place]
        if not poolings:
            return
        hidden = next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
        if hidden is None or not self._is_rows(hidden):
            shape = "no tensor" if hidden is None else f"of shape {list(hidden.shape)}"
            message = f"the hidden states {_where(place)} are {shape}, not [rows, tokens, width]"
            raise self._refused(place, message)
        for pooling in poolings:
            self.points[place, pooling].append(_pooled(hidden, self.mask, pooling).cpu())

    def _is_rows(self, hidden: Tensor) -> bool:
        if self.mask is None:
            return hidden.ndim in (2, 3)
        return hidden.ndim == 3 and hidden.shape[:2] == self.mask.shape

    def _refused(self, place: Place, message: str) -> SurgError:
        one = next(one for one in self.draft.measured if any(path.startswith(f"{place[0]}.") for path in one.blocks))
        return fail("SURG036", message, self.draft.span(one.place), help="give these weights a rule with a number")


def _pooled(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """One point per row, `[rows, width]` in float32 or wider, of hidden states `[rows, tokens, width]`.

    `mean` is that of the tokens under the `mask` `[rows, tokens]`, `last` the last one. Without tokens a row is its
    point.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if hidden.ndim == 2:
        return hidden
    real = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else (mask != 0)
    if pooling == "last":
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        last = (real * positions).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    weights = real.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)
