"""How much memory a training step takes: the step's own text is run on tensors without storage, and counted.

There is no second model of memory beside the code. A storage counts from the operation that makes it until nobody
holds it, as the allocator sees it; what a kernel takes for itself is not seen. Attention is as the fused kernels do it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from surgery.compiler.emit.blocks import of_block
from surgery.compiler.fused import fused
from surgery.compiler.graph import tensors
from surgery.compiler.plan import MemoryPlan, Plan, StepPlan
from surgery.compiler.skeleton import Skeleton
from surgery.compiler.storages import BACKWARD, GRADIENTS, OPTIMIZER, OUTPUTS, TRAINED, WEIGHTS, Storages

if TYPE_CHECKING:
    from surgery.runtime.step import TrainingStep


class _OfAGPU:
    """`torch.nn.functional` with attention as a GPU runs it: by a kernel that forms no `[length, length]` matrix.

    Tensors without storage would take the path that does.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)

    @staticmethod
    def scaled_dot_product_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if attn_mask is None:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention
            return kernel(query, key, value, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
        if attn_mask.dtype == torch.bool:  # as torch itself prepares it
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


def of_plan(
    plan: Plan, model: nn.Module, examples: Mapping[str, Tensor] | None = None, *, whole_logits: bool = False
) -> MemoryPlan:
    """The memory of a plan's step for `model`, which may be a skeleton on meta; it is captured, which takes a while.

    With `whole_logits` the loss is not taken in chunks of rows. Raises SurgError as `surgery.compile` does where the
    model cannot be captured or the loss is not known.
    """
    from surgery.compiler import p5_capture, p9_emit, pipeline
    from surgery.compiler.examples import example_inputs
    from surgery.runtime.initialise import Sources, initialise
    from surgery.runtime.quantize import quantized_copy
    from surgery.runtime.step import TrainingStep

    if plan.quantized is not None:
        model = quantized_copy(model, plan, contents=False)
    place = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    packed = plan.data is not None and plan.data.pack
    given = example_inputs(model, plan.model.task, packed) if examples is None else examples
    graph = p5_capture.run(model, {name: value.to(place) for name, value in given.items()}, plan.model.task)
    empty = {
        tensor.key: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device=place)
        for site in plan.sites
        for tensor in site.tensors
    }
    starts = initialise(plan, tensors(graph.module), Sources(saved=empty))
    # A given model may be on a device where the step would be compiled, which takes long and is not needed.
    plain = plan.model_copy(update={"step": plan.step.model_copy(update={"compile": "off"})})
    graph = pipeline.adapt(plain, graph, starts)
    source = p9_emit.run(plain, graph, whole_logits=True) if whole_logits else None
    step = TrainingStep(plain, graph, model, source=source)
    step.plan = plan
    return predicted(step, planned_length(plan, model))


def planned_length(plan: Plan, model: nn.Module) -> int:
    """How long the rows of a batch are: as the data are cut, else what makes the planned tokens."""
    if plan.data is not None:
        return plan.data.max_length
    length = max(2, plan.tokens // (plan.step.micro_batch or plan.step.batch))
    return min(length, Skeleton(model).positions or length)


def predicted(step: TrainingStep, length: int, device: str = "cuda") -> MemoryPlan:
    """The memory of `step`, which may be on meta, at the spec's batch of rows of `length`: of its largest `step` block.

    On "cuda" what the spec lets torch compile is counted as that; on "cpu" nothing is compiled, and attention is as the
    CPU's kernels do it.
    """
    blocks = [_of_block(step, block.step, length, device) for block in step.plan.blocks]
    return max(blocks, key=lambda found: found.peak)


def _of_block(step: TrainingStep, settings: StepPlan, length: int, device: str) -> MemoryPlan:
    with FakeTensorMode():
        weights, model = without_storage(step)
        batch = _batch(step, weights, settings.batch, length)
        replaced: dict[str, Any] = {"without_padding": lambda part: part}  # at most all is real
        if device == "cuda":
            replaced["F"] = _OfAGPU()
        if device == "cuda" and step.plan.step.compile != "off":
            try:
                return measured(step, weights, model, batch, replaced, compiled=True, block=settings.number)
            except Exception:  # torch's tracing may raise anything; the record says that nothing was compiled
                weights, model = without_storage(step)
        return measured(step, weights, model, batch, replaced, block=settings.number)


def measured(
    step: TrainingStep, weights: Mapping[str, Tensor], model: list[Tensor], batch: Mapping[str, Tensor],
    replaced: Mapping[str, Any] = MappingProxyType({}), compiled: bool = False, block: int = 0,
) -> MemoryPlan:  # fmt: skip
    """The memory of two steps of a `block` over these weights, beside which the `model`'s other tensors stay.

    The second is the first one with the state of the optimizer. `replaced` are names of step.py. `compiled`: with what
    torch's compiler would keep and store, which takes tensors without storage.
    """
    namespace = _executed(step.source)
    namespace.update(replaced)
    storages = Storages()
    if compiled:
        namespace["compiled"] = lambda function: fused(function, storages)
        namespace["compile_forward"]()
    make, _, take = of_block(namespace, block)
    optimizer = make(weights)  # from here on the block's own tensors alone require gradients
    for tensor in weights.values():
        storages.add(tensor, TRAINED if tensor.requires_grad else WEIGHTS)
    for tensor in model:
        storages.add(tensor, WEIGHTS)
    for tensor in batch.values():
        storages.add(tensor, OUTPUTS)
    hooks = [
        tensor.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda one: _is_gradient(storages, one)
        )
        for tensor in dict.fromkeys(weights.values())
        if tensor.requires_grad
    ]
    _label_blocks(namespace, weights, storages)
    optimizer.step = _labelled(optimizer.step, storages, OPTIMIZER)
    settings = step.plan.step_blocks
    where = (0, 2) if len(settings) > 1 else ()
    scaler = (torch.amp.GradScaler(enabled=False),) if step.plan.step.precision == "float16" else ()
    try:
        with storages:
            for number in range(2):
                take(weights, optimizer, dict(batch), number, 2, *where, *scaler)
    finally:
        for hook in hooks:
            hook.remove()
    first = next(iter(batch.values()))
    parts = dict(storages.peak)
    sums = {name: parts.pop(name, 0) for name in (WEIGHTS, TRAINED, GRADIENTS, OPTIMIZER, OUTPUTS, BACKWARD)}
    return MemoryPlan(
        compiled=compiled,
        rows=min(settings[block].micro_batch or len(first), len(first)),
        length=first.shape[1] if first.ndim > 1 else 1,
        kept=sum(parts.values()), peak=storages.most, blocks=parts, **sums,
    )  # fmt: skip


def _is_gradient(storages: Storages, tensor: Tensor) -> None:
    assert tensor.grad is not None
    storages.relabel(tensor.grad, GRADIENTS)


def _labelled(function: Callable[..., Any], storages: Storages, label: str) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        with storages.labelled(label):
            return function(*arguments, **options)

    return run


def _label_blocks(namespace: dict[str, Any], weights: Mapping[str, Tensor], storages: Storages) -> None:
    """What a block function makes is labelled with the path of the block that it runs."""
    names = {id(tensor): name for name, tensor in weights.items()}

    def labelled(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(w: Mapping[str, Tensor], *arguments: Any) -> Any:
            inner, tensor = next(iter(w.items()), ("", None))
            path = names.get(id(tensor), "").removesuffix(f".{inner}") or "blocks"
            with storages.labelled(path):
                return function(w, *arguments)

        return run

    for name in namespace["COMPILED"]:
        # else it is not one of a block
        if name != "head" and next(iter(inspect.signature(namespace[name]).parameters)) == "w":
            namespace[name] = labelled(namespace[name])


def without_storage(step: TrainingStep) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The step's tensors by name, and the model's where they are others on the same device; fake, ties kept."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            learns = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if learns else empty
        return made[id(tensor)]

    weights = {name: fake(tensor) for name, tensor in step.weights.items()}
    own = {tensor.untyped_storage()._cdata for tensor in step.weights.values()}
    others = [
        tensor
        for tensor in dict.fromkeys([*step.model.parameters(), *step.model.buffers()])
        if tensor.device == step.device and tensor.untyped_storage()._cdata not in own
    ]
    return weights, [fake(tensor) for tensor in others]


def _batch(step: TrainingStep, weights: Mapping[str, Tensor], rows: int, length: int) -> dict[str, Tensor]:
    """A batch of that many rows: `[rows, length]` for what has a length, else the captured sizes."""
    from surgery.compiler.p9_emit import chosen_loss

    batch: dict[str, Tensor] = {}
    for node in step.graph.module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            whole = not value.is_floating_point() and value.ndim > 1
            sizes = [_size(size, length if whole else None) for size in value.shape]
            batch[str(node.target)] = torch.empty([rows, *sizes[1:]], dtype=value.dtype)
    chosen = chosen_loss(step.plan, step.graph)
    if chosen.labels not in batch:
        with torch.no_grad():
            output = _executed(step.source)["forward"](weights, *batch.values(), training=False)
        output = output if chosen.output is None else output[chosen.output]
        numbers = chosen.loss.name in ("mse", "binary")
        shape, dtype = (output.shape, torch.float32) if numbers else (output.shape[:-1], torch.int64)
        batch[chosen.labels] = torch.empty(shape, dtype=dtype)
    return batch


def _size(size: int | torch.SymInt, length: int | None) -> int:
    """The planned size of an axis: where it is dynamic `length`, or if that is not for it what the example had."""
    if isinstance(size, torch.SymInt):
        return length or int(size.node.hint)
    return size


def _executed(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "surgery_step"}
    exec(compile(source, "<step.py>", "exec"), namespace)
    return namespace
