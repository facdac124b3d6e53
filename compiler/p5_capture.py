"""Pass 5: the model as one graph: training mode, dynamic sizes, labels outside, logits out, caches off."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import SymInt, Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from surgery.compiler.capture.causal import restore_causal
from surgery.compiler.capture.isolate import buffer_contents, keep_layers, restore, untouched
from surgery.compiler.capture.plain import Uncapturable, plain
from surgery.compiler.capture.repeated import NotAlike, Repeated
from surgery.compiler.diagnostics import Diagnostic, SurgError, did_you_mean, fail
from surgery.compiler.graph import TRAINING, Graph, tensors
from surgery.compiler.kernels.forms import HALF
from surgery.compiler.kernels.quantized_linear import quantized_linear

Inputs = dict[str, Tensor]


def run(model: nn.Module, example_inputs: Inputs, task: str | None) -> Graph:
    """Capture `model` as a graph that takes the inputs of `example_inputs`, in training mode and in evaluation.

    With a `task` the graph gives the logits (`last_hidden_state` for feature_extraction), else the flat list of the
    module's outputs. Batch and length stay dynamic, whatever the example's sizes. The model is left as it was, to the
    bit and the flag, also on an error. Raises SurgError: SURG040 if torch cannot capture the model or the graph would
    not be the model, SURG042 if the inputs do not fit it.
    """
    inputs = _fit(model, example_inputs)
    with untouched(model), torch.enable_grad():
        model.train()
        keep_layers(model)
        wrapper = _Wrapper(model, tuple(inputs), task)
        exported, module = _once_per_kind(wrapper, inputs) or _whole(wrapper, inputs)
        restore_causal(module)
        _name_kernels(module)
    return Graph(
        module=module,
        inputs=tuple(inputs),
        output="tree" if task is None else "logits",
        output_spec=exported.call_spec.out_spec if task is None else None,
        warnings=_warnings(model, module),
    )


# Operations of surgery's own that a model's modules call, by the functions that passes and step.py know.
KERNELS: dict[Any, Any] = {torch.ops.surgery.quantized_linear.default: quantized_linear}


def _name_kernels(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.target in KERNELS:
            node.target = KERNELS[node.target]
            while node.args[-1] in (None, False):  # export writes what is left out
                node.args = node.args[:-1]
    module.recompile()


Captured = tuple[ExportedProgram, fx.GraphModule]


def _whole(wrapper: _Wrapper, inputs: Inputs) -> Captured:
    exported = _export(wrapper, inputs)
    _check_dynamic(exported, inputs)
    try:
        module = plain(exported, wrapper.model, tuple(inputs), single=wrapper.task is not None)
    except Uncapturable as reason:
        raise fail("SURG040", f"the model cannot be captured: {reason}") from reason
    if not any(tensor.is_meta for tensor in tensors(wrapper.model).values()):
        _check_equal(wrapper, module, exported, inputs)
    return exported, module


def _once_per_kind(wrapper: _Wrapper, inputs: Inputs) -> Captured | None:
    """The same from one block of each kind; None where there are not enough of one, or at any doubt that they are."""
    repeated = Repeated(wrapper.model)
    if not repeated.groups:
        return None
    try:
        with repeated.standing_in():
            exported = _export(wrapper, inputs)
        _check_dynamic(exported, inputs)
        module = plain(exported, wrapper.model, tuple(inputs), single=wrapper.task is not None)
        repeated.write_out(module)
        devices = {tensor.device.type for tensor in tensors(wrapper.model).values()}
        if "meta" not in devices:
            # A GPU takes other kernels for a mask that is written out: there the bits differ for the whole model too.
            _check_equal(wrapper, module, exported, inputs, to_the_bit=devices <= {"cpu"})
    except (NotAlike, Uncapturable, SurgError):  # whatever is wrong, the whole model will say it
        return None
    return exported, module


class _Wrapper(nn.Module):
    """The model with its inputs as one list, without labels and caches, and with the logits alone as its output."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], task: str | None) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.task = task
        parameters = inspect.signature(model.forward).parameters
        self.positional = [name for name in names if _by_position(parameters.get(name))]
        # As arguments, not in the config: the config is the user's.
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        if getattr(getattr(model, "config", None), "return_dict", True) is False and task is not None:
            self.options["return_dict"] = True
        self.training = model.training

    def forward(self, values: list[Tensor]) -> Any:
        named = dict(zip(self.names, values, strict=True))
        ordered = [named.pop(name) for name in self.positional]
        output = self.model(*ordered, **named, **self.options)
        return output if self.task is None else _logits(output, self.task)


def _by_position(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and parameter.kind is inspect.Parameter.POSITIONAL_ONLY


def _logits(output: Any, task: str) -> Tensor:
    name = "last_hidden_state" if task == "feature_extraction" else "logits"
    logits = output.get(name) if isinstance(output, dict) else getattr(output, name, output)
    if not isinstance(logits, Tensor):
        raise fail("SURG031", f"the model gives no `{name}`, which task {task} needs")
    return logits


def _fit(model: nn.Module, given: Inputs) -> Inputs:
    """The example inputs on the model's device, with a batch of at least two; SURG042 where they do not fit."""
    parameters = inspect.signature(model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if not given:
        raise fail(
            "SURG042", "there are no example inputs", help="pass a dict of tensors by the forward's parameter names"
        )
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise fail("SURG042", f"example input `{name}` is a {type(value).__name__}, not a tensor")
        if name == TRAINING:
            raise fail(
                "SURG042", f"an input cannot be called `{TRAINING}`: the captured graph has an input of that name"
            )
        if name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            known = did_you_mean(name, parameters)
            raise fail("SURG042", f"{type(model).__name__}.forward has no parameter `{name}`", help=known)
    for name, parameter in parameters.items():
        variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if parameter.default is inspect.Parameter.empty and not variadic and name not in given:
            raise fail("SURG042", f"{type(model).__name__}.forward needs `{name}`, which the example inputs lack")
    device = next((tensor.device for tensor in tensors(model).values()), torch.device("cpu"))
    inputs = {name: value.detach().to(device) for name, value in given.items()}
    # torch takes a size of 1 for a constant. Only shapes matter here, so a single row is shown to it twice.
    if all(value.dim() > 0 and value.shape[0] == 1 for value in inputs.values()):
        inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
    return inputs


def _export(wrapper: _Wrapper, inputs: Inputs) -> ExportedProgram:
    sizes = [dict.fromkeys(range(value.dim()), Dim.AUTO) for value in inputs.values()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(wrapper, (list(inputs.values()),), dynamic_shapes=(sizes,), strict=False)
    except SurgError:
        raise
    except Exception as error:  # a model's forward may raise anything, and torch's own errors have no common base
        raise fail(
            "SURG040",
            f"torch.export cannot capture {type(wrapper.model).__name__}: {_first_line(error)}",
            help="a forward that branches on the values of a tensor, or turns one into a Python number, has no graph; "
            "`surgery.apply` adapts such a model module by module",
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    useful = [
        line for line in lines if line and not line.startswith(("For more information", "The error above", "Traceback"))
    ]
    return f"{type(error).__name__}: {useful[0][:300]}" if useful else type(error).__name__


def _check_dynamic(exported: ExportedProgram, inputs: Inputs) -> None:
    """SURG040 if the batch, or the length of a [batch, length] input, became a constant or a formula."""
    shown = [node for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs]
    for node, (name, value) in zip(shown, inputs.items(), strict=True):
        whole_numbers = not value.is_floating_point() and value.dim() == 2
        for axis in range(min(value.dim(), 2 if whole_numbers else 1)):
            size = node.meta["val"].shape[axis]
            if isinstance(size, SymInt) and size.node.expr.is_Symbol:
                continue
            what = "batch" if axis == 0 else "length"
            raise fail(
                "SURG040",
                f"the {what} of `{name}` cannot stay dynamic: the model's forward admits only {size}",
                help="remove the branch or the fixed shape that depends on it, or give an example with a size above 1",
            )


def _check_equal(
    wrapper: _Wrapper, module: fx.GraphModule, exported: ExportedProgram, inputs: Inputs, *, to_the_bit: bool = False
) -> None:
    """SURG040 unless the graph is the model in evaluation, at another batch and length where the model has one."""
    model = wrapper.model
    model.eval()
    contents = buffer_contents(model)
    with torch.no_grad():
        for sample in (_smaller(exported, inputs), inputs):
            try:
                expected = pytree.tree_leaves(wrapper(list(sample.values())))
            except Exception:  # the smaller sample may be too small for the model, which says so in its own way
                if sample is inputs:
                    raise
                continue
            finally:
                changed_by_model = [not torch.equal(*pair) for pair in contents]
                restore(contents)
            got = module(**sample, training=False)
            changed_by_graph = [not torch.equal(*pair) for pair in contents]
            restore(contents)
            break
    pairs = list(zip(expected, pytree.tree_leaves(got), strict=True))
    same = all((_identical if to_the_bit else _alike)(theirs, ours) for theirs, ours in pairs)
    if not same or changed_by_model != changed_by_graph:
        raise fail(
            "SURG040",
            f"the captured graph of {type(model).__name__} does not compute what the model computes in evaluation mode",
            help="only dropout and running statistics may depend on the mode; look for `self.training` in the forward, "
            "or for functional dropout without `training = self.training`",
        )


def _smaller(exported: ExportedProgram, inputs: Inputs) -> Inputs:
    """The example with a batch of one and with shorter dynamic lengths, so that a size that was baked in shows."""
    sizes: dict[Any, int] = {}
    smaller = {}
    shown = [node for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs]
    for node, (name, value) in zip(shown, inputs.items(), strict=True):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, SymInt):
                wanted = 1 if axis == 0 else max(value.shape[axis] - 2, 1)
                value = value.narrow(axis, 0, sizes.setdefault(size.node.expr, wanted))
        smaller[name] = value
    return smaller


def _identical(expected: Any, got: Any) -> bool:
    if not (isinstance(expected, Tensor) and isinstance(got, Tensor)):
        return bool(expected == got)
    same = expected.shape == got.shape and expected.dtype == got.dtype
    return same and torch.equal(expected.nan_to_num(), got.nan_to_num())


def _alike(expected: Any, got: Any) -> bool:
    if not isinstance(expected, Tensor):
        return bool(expected == got)
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    tolerance = 2e-2 if expected.dtype in HALF else 1e-3
    return torch.allclose(expected.double(), got.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def _warnings(model: nn.Module, module: fx.GraphModule) -> tuple[Diagnostic, ...]:
    """SURG056 if the model uses activation checkpointing, which torch.export drops without a word."""
    asked = any(getattr(part, "gradient_checkpointing", False) is True for part in model.modules())
    called = any(re.search(r"\bcheckpoint\(", node.meta.get("stack_trace") or "") for node in module.graph.nodes)
    if not (asked or called):
        return ()
    message = "the model's activation checkpointing is not part of the captured graph: activations are kept"
    help = "write `recompute = blocks` in the step block: the backward then runs each block again"
    return (Diagnostic("SURG056", message, severity="warning", help=help),)
