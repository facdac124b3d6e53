"""The public functions: parse, plan, compile, apply, load."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.compiler import nodes
from surgery.compiler.diagnostics import SurgError, fail, render
from surgery.compiler.program import Program
from surgery.compiler.span import Source

if TYPE_CHECKING:
    import torch
    from torch import nn

    from surgery.compiler.plan import MeasuredPlan, Plan
    from surgery.runtime.step import TrainingStep


def parse(path_or_text: str | Path, folder: str | Path | None = None, name: str = "<text>") -> Program:
    """A checked program from a `.surg` file or from text; text is what has a brace, a newline or no `.surg` at its end.

    `folder` is where the files named in the spec are looked for (default: the file's own, for text the current one);
    `name` is what diagnostics call a text. Raises `SurgError` with everything that is wrong.
    """
    from surgery.compiler import p1_parse, p2_check
    from surgery.compiler.pass_log import logged
    from surgery.compiler.source import read

    text = str(path_or_text)
    if isinstance(path_or_text, Path) or (text.endswith(".surg") and "\n" not in text and "{" not in text):
        source, home = read(Path(path_or_text)), Path(path_or_text).parent
    else:
        source, home = Source(name, text), Path()
    program: Program = logged(p2_check, logged(p1_parse, source), Path(folder) if folder else home)
    return program


def _check_given(program: object, model: object) -> None:
    """Raises TypeError for what is no program or no module; a text is a program only after `parse`."""
    from torch import nn

    if not isinstance(program, Program):
        hint = "; make one with surgery.parse(...)" if isinstance(program, str | Path) else ""
        raise TypeError(f"a surgery.Program is needed here, not a {type(program).__name__}{hint}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a torch.nn.Module, not a {type(model).__name__}")


def plan(
    program: Program, model: nn.Module | None = None, *, memory: bool = False, processes: int = 1,
    scope: Literal["graph", "module"] = "graph", allow_code: bool = False,
    calibration: Sequence[Mapping[str, torch.Tensor]] | None = None,
    numbers: Literal["measured", "draft"] | tuple[MeasuredPlan, ...] = "measured",
) -> Plan:  # fmt: skip
    """What would be adapted, how, and at what cost; without `model` its skeleton is made from the config, on meta.

    No weights are loaded, unless a rule reads a number of the data (`rank = hidden_dimension_gain()`): this one is
    measured with them on the `calibration` batches, or on rows of the spec's data. In a draft each such `number` is 1,
    and those of another plan (`plan.measured`) are taken as they are. With `memory` the step is run on tensors without
    storage: the plan then says what memory it takes. Raises `SurgError` with everything that does not fit the model.
    """
    from surgery.compiler import pipeline
    from surgery.compiler.memory_spread import of_processes
    from surgery.runtime.measure import measurements
    from surgery.runtime.models import load_skeleton

    _check_given(program, model)
    given = model
    if model is None:
        with at_model_line(program):
            model = load_skeleton(_model_of(program), program.folder, allow_code=allow_code)
    known = None if numbers == "draft" else numbers
    if known == "measured":
        load = (lambda: _load(program, allow_code)) if given is None else None
        known = measurements(program, model, calibration, load)
    made = pipeline.resolve(program, model, measured=known)
    return made.model_copy(update={"memory": of_processes(made, model, processes, scope)}) if memory else made


def _load(program: Program, allow_code: bool, device: str | torch.device | None = None) -> nn.Module:
    """The spec's model with its weights, on a GPU where there is one and nothing else is said."""
    import torch

    from surgery.runtime.models import load_model

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with at_model_line(program):
        return load_model(_model_of(program), program.folder, place, allow_code=allow_code, seed=program.step.seed)


@contextmanager
def at_model_line(program: Program) -> Iterator[None]:
    """What goes wrong in loading the model is said at the spec's `model` line."""
    try:
        yield
    except SurgError as error:
        line = next((item.span for item in program.tree.items if isinstance(item, nodes.Model)), None)
        raise SurgError([replace(found, span=found.span or line) for found in error.diagnostics]) from error


def _model_of(program: Program) -> Any:
    if program.model is None:
        help_text = 'add `model "org/name" { task = ... }`, or give the model in Python'
        raise fail("SURG030", "the program names no model", program.tree.span, help=help_text)
    return program.model


def compile(
    program: Program, model: nn.Module | None = None, example_inputs: Mapping[str, torch.Tensor] | None = None,
    device: str | torch.device | None = None, calibration: Sequence[Mapping[str, torch.Tensor]] | None = None,
    *, allow_code: bool = False,
) -> TrainingStep:  # fmt: skip
    """The training step of a program: the model captured as a graph, rewritten, and emitted as code that runs.

    `model` (any `nn.Module`) is left as it is, and stands for the spec's; else the spec's is loaded. `example_inputs`
    are made from the task and the config where they are left out. `device`: default the given model's, else a GPU if
    there is one. `calibration` batches, as the step takes them, are for methods whose starts read data, and for numbers
    of the data, which are else measured on rows of the spec's. Raises `SurgError`.
    """
    return _compile(program, model, example_inputs, device, calibration, allow_code=allow_code)


def _compile(
    program: Program, model: nn.Module | None, example_inputs: Mapping[str, torch.Tensor] | None,
    device: str | torch.device | None, calibration: Sequence[Mapping[str, torch.Tensor]] | None = None,
    saved: Mapping[str, torch.Tensor] | None = None, measured: tuple[MeasuredPlan, ...] | None = None,
    *, allow_code: bool,
) -> TrainingStep:  # fmt: skip
    """`compile`, with the tensors and numbers of a run where there are some: these are not computed again."""
    import torch

    from surgery.compiler import p5_capture, pipeline
    from surgery.compiler.capture.documents import check_documents
    from surgery.compiler.examples import example_inputs as make_examples
    from surgery.compiler.graph import tensors
    from surgery.compiler.pass_log import logged
    from surgery.runtime.calibrate import calibrate, missing
    from surgery.runtime.devices import device_of
    from surgery.runtime.initialise import Sources, initialise
    from surgery.runtime.measure import measurements
    from surgery.runtime.quantize import quantize_model, quantized_copy
    from surgery.runtime.step import TrainingStep

    _check_given(program, model)
    loaded, place = model is None, None if device is None else device_of(device)
    if model is None:
        line, place = _model_of(program), place or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # dense weights go there one by one, to be quantized
        model = _load(program, allow_code, "cpu" if line.quantize else place)
    if measured is None:
        measured = measurements(program, model, calibration, examples=example_inputs)
    made = pipeline.resolve(program, model, example_inputs, measured=measured)
    if not made.totals.trainable:
        advice = "give a tensor of the method the role `train`, or add a rule such as `train classifier`"
        raise fail("SURG020", "the program trains nothing", made.span(made.sites[0].place), help=advice)
    reads_data = saved is None and any(site.facts.needs_calibration for site in made.sites)
    if reads_data and not calibration:
        raise missing(made)
    if made.quantized is not None:
        model = quantize_model(model, made, place) if loaded else quantized_copy(model, made)
    task = made.model.task
    where = next((tensor.device for tensor in tensors(model).values()), torch.device("cpu"))
    packed = made.data is not None and made.data.pack
    examples = dict(example_inputs) if example_inputs is not None else make_examples(model, task, packed)
    examples = {name: value.to(where) if isinstance(value, torch.Tensor) else value for name, value in examples.items()}
    graph = logged(p5_capture, model, examples, task)
    if packed and example_inputs is None:
        check_documents(made, graph, examples)
    for found in () if made.recomputed else graph.warnings:  # the step has what they say is dropped
        warnings.warn(render(found), stacklevel=2)
    seen = calibrate(made, graph, calibration) if reads_data and calibration else None
    starts = initialise(made, tensors(graph.module), Sources(program.folder, seen, saved))
    graph = pipeline.adapt(made, graph, starts)
    return TrainingStep(made, graph, model, folder=program.folder, device=device)


def apply(program_or_run: Program | str | Path, model: nn.Module) -> nn.Module:
    """Module scope: the chosen modules are replaced in place, all or none, everything else is frozen; gives the model.

    With a run folder the trained tensors are put in as well. Events run in a `transformers.Trainer` that is given
    `callbacks=[surgery.TrainerCallback(model)]`; to train without is an error. Raises SURG060 for programs that need
    earlier blocks, SURG036 for starts that read data (apply a run instead), and what a program may.
    """
    from surgery.runtime.modules import apply_program, apply_run

    text = isinstance(program_or_run, str) and ("{" in program_or_run or "\n" in program_or_run)
    if isinstance(program_or_run, Program) or text:
        _check_given(program_or_run, model)
    if isinstance(program_or_run, Program):
        return apply_program(program_or_run, model)
    return apply_run(Path(program_or_run), model)


def load(
    directory: str | Path, model: nn.Module | None = None, *,
    example_inputs: Mapping[str, torch.Tensor] | None = None, device: str | torch.device | None = None,
    allow_code: bool = False,
) -> TrainingStep:  # fmt: skip
    """The training step of a run folder or a compiled folder, as it was saved.

    `model` where the spec names none, with `example_inputs` where they cannot be made from its config.
    """
    from surgery.runtime.run_folder import load_state

    state = load_state(directory)
    program = parse(state.spec, state.folder, state.plan.file)
    saved = state.state["weights"]
    measured = state.plan.measured
    step = _compile(program, model, example_inputs, device, saved=saved, measured=measured, allow_code=allow_code)
    step.load_state_dict(state.state)
    return step
