"""`surgery train`: run the training step over the spec's data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli.common import (
    CodeOption,
    DeviceOption,
    Format,
    FormatOption,
    Scope,
    ScopeOption,
    answer,
    calibration_of,
    check_output,
    data_of,
    load_run,
    note,
    reporting,
    show,
)
from surgery.compiler.diagnostics import SurgError, fail

if TYPE_CHECKING:
    from surgery.compiler.plan import Plan
    from surgery.runtime.data import Data
    from surgery.runtime.step import TrainingStep


EXAMPLE = "Example: surgery train specs/demo.surg -o runs/demo; after Ctrl-C: surgery train runs/demo --resume"
NEEDS_ARGUMENTS = True


def run(
    spec: Annotated[
        Path, typer.Argument(metavar="SPEC|DIR", help="a .surg file, a compiled folder or a run", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="RUN", help="the run folder; left out: runs/NAME, or DIR itself",
                     show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run as if unbroken")] = False,
    scope: ScopeOption = None,
    device: DeviceOption = None,
    format: FormatOption = Format.text,
    allow_code: CodeOption = False,
) -> None:  # fmt: skip
    """Train: reads the spec's data, runs the training step, writes a run folder.

    Ctrl-C finishes the step, saves and says how to continue. A loss that is not finite ends the run and keeps the last
    good state. metrics.jsonl in the run folder has a row for every step (steps count from 0).
    """
    from surgery.runtime import distributed

    with distributed.joined(device), distributed.heard_once(), reporting(format):
        folder = output or (spec if spec.is_dir() else Path("runs") / spec.stem)
        check_output(folder)
        _train(spec, folder, resume, scope, own_device(device), format, allow_code)


def _train(
    spec: Path, folder: Path, resume: bool, scope: Scope | None, device: str | None, format: Format, allow_code: bool
) -> None:  # fmt: skip
    """Run and say how it ended."""
    from surgery.cli.plan_text import measured_lines
    from surgery.runtime import distributed
    from surgery.runtime.best import BEST
    from surgery.runtime.data import lengths_of
    from surgery.runtime.distributed_checks import check_model
    from surgery.runtime.train import train

    step, data = _start(spec, folder, resume, scope, device, allow_code)
    check_model(step.plan, step.model).raise_errors()
    step.lengths = lengths_of(step.plan, len(data.train))
    terminal = sys.stderr.isatty()
    for line in measured_lines(step.plan):
        note(line)
    several = distributed.processes() > 1
    if several:
        how = "the model is spread over them by rows" if step.scope == Scope.module else "each has the whole model"
        note(f"{distributed.processes()} processes: {how}")
    _note_prediction(step)
    outcome = train(step, data, folder, resume=resume, log=None if terminal else note)
    if step.device.type == "cuda":
        import torch

        note(f"memory: {torch.cuda.max_memory_allocated(step.device) / 2**30:.2f} GiB at the peak")
    scores = {name: value for name, value in outcome.evaluation.items() if name != "rows"}
    evaluation = "".join(f", held-out {name} {value:.4f}" for name, value in scores.items())
    best = outcome.best
    if best is not None and best.value is not None:
        why = f"stopped, since {best.since} evaluations were no better; " if outcome.stopped else ""
        note(f"{why}best {best.score} {best.value:.4f} after {best.steps} steps, kept in {folder / BEST}")
    if outcome.interrupted:
        note(f"interrupted and saved after {outcome.done} of {outcome.steps} steps; continue with:")
        note(f"  surgery train {folder} --resume")
        if several:
            note("  by the launcher, with as many processes or another number of them")
    if format is Format.json:
        answer({"run": str(folder), "steps": outcome.done, "of": outcome.steps, "loss": outcome.loss,
                "evaluation": scores, "seconds": outcome.seconds, "interrupted": outcome.interrupted,
                "stopped": outcome.stopped, "best": best and best.record()})  # fmt: skip
    elif not outcome.interrupted:
        if outcome.loss is None:
            typer.echo(f"{folder}: nothing is left to do, its {outcome.done} steps are done")
        else:
            said = f"{outcome.done} steps in {outcome.seconds:.0f} s, loss {outcome.loss:.4f}{evaluation}"
            typer.echo(f"{folder}: {said}")
    if outcome.interrupted:
        raise typer.Exit(130)


def own_device(device: str | None) -> str | None:
    """The device of this process; of several processes each has the GPU of its number on its machine."""
    from surgery.runtime import distributed
    from surgery.runtime.devices import why_not

    if distributed.processes() == 1:
        return device
    if device not in (None, "cpu", "cuda"):
        message = f"`{device}` is one device, and the launcher started {distributed.processes()} processes"
        raise typer.BadParameter(f"{message}; leave it out, or say cuda or cpu", param_hint="--device")
    if device == "cpu":
        return device
    own = distributed.local_device()
    if reason := why_not(own):
        help = "start as many processes on a machine as it has GPUs, or say --device cpu"
        raise fail("SURG072", f"process {distributed.number()} has no GPU of its own: {reason}", help=help)
    return own


def _start(
    spec: Path, folder: Path, resume: bool, scope: Scope | None, device: str | None, allow_code: bool
) -> tuple[TrainingStep, Data]:  # fmt: skip
    """The step to run and its data. The data is read first: what is wrong with it shows before the model is loaded."""
    import surgery
    from surgery.runtime.distributed_checks import check_spread
    from surgery.runtime.module_step import module_step
    from surgery.runtime.run_folder import is_run, load_state
    from surgery.runtime.trackers import check_installed

    if resume and spec.is_dir() and folder != spec:
        raise typer.BadParameter("--resume continues in DIR itself; leave -o out", param_hint="-o")
    if not resume and is_run(folder) and (done := load_state(folder, mapped=True).step) > 0:
        message = f"`{folder}` is a run with {done} steps done; continue it with --resume, or choose another folder"
        raise typer.BadParameter(message, param_hint="-o")
    if not resume and not spec.is_dir():
        program = surgery.parse(spec)
        show(program.warnings)
        plan = surgery.plan(program, allow_code=allow_code, numbers="draft")
        check_spread(plan, scope or Scope.graph).raise_errors()
        check_installed(plan, program.folder)
        data = data_of(plan, program.folder)
        batches = calibration_of(plan, program.folder, data)
        if scope is Scope.module:
            return module_step(program, device, calibration=batches, allow_code=allow_code), data
        return surgery.compile(program, device=device, calibration=batches, allow_code=allow_code), data
    source = folder if resume else spec
    state = load_state(source, mapped=True)
    known = Scope(state.extra.get("scope", Scope.graph))
    if scope not in (None, known):
        raise typer.BadParameter(f"`{source}` is in {known} scope, and goes on in it", param_hint="--scope")
    scope = known
    check_spread(state.plan, scope).raise_errors()
    if not resume and state.step > 0:
        raise typer.BadParameter(f"`{spec}` is a run with {state.step} steps done; continue it with --resume")
    if not spec.is_dir():
        program = surgery.parse(spec)
        again = surgery.plan(program, allow_code=allow_code, numbers="draft")
        if again.measured and _asked(again) == _asked(state.plan):  # else it is another plan anyway
            again = surgery.plan(program, allow_code=allow_code, numbers=state.plan.measured)
        _check_same(again, state.plan, folder)
    check_installed(state.plan, state.folder)
    data = data_of(state.plan, state.folder, state.extra.get("labels", ()))
    if scope is Scope.module:
        program = surgery.parse(state.spec, state.folder, state.plan.file)
        step: TrainingStep = module_step(program, device, state=state, allow_code=allow_code)
        step.load_state_dict(state.state)
    else:
        step = load_run(source, device, allow_code)
    if step.source != state.source:  # what is read must be what runs, and a folder's code is never run unasked
        raise _edited(source)
    return step, data


def _note_prediction(step: TrainingStep) -> None:
    """On a GPU say what the step should take, and count what it does take from here on."""
    if step.device.type == "cuda" and step.scope == Scope.graph:
        import torch

        from surgery.compiler.memory import planned_length, predicted

        found = predicted(step, planned_length(step.plan, step.model))
        how = "compiled" if found.compiled else "not compiled"
        note(f"memory: {found.peak / 2**30:.2f} GiB predicted for {found.rows} x {found.length}, {how}")
        torch.cuda.reset_peak_memory_stats(step.device)


def _edited(folder: Path) -> SurgError:
    message = f"`{folder}/step.py` is not what its spec compiles to: it was edited, or another version wrote it"
    return fail("SURG054", message, help="compile the spec anew; python step.py --data FILE runs the file as it is")


def _asked(plan: Plan) -> list[tuple[str, set[str]]]:
    """The numbers of the data that a plan takes, and of which blocks."""
    return [(one.call, set(one.blocks)) for one in plan.measured]


def _check_same(plan: Plan, before: Plan, folder: Path) -> None:
    if _meaning(plan.model_dump()) != _meaning(before.model_dump()):
        help = f"continue it as it was with `surgery train {folder} --resume`, or train into a new folder"
        raise fail("SURG054", f"`{folder}` is a run of another spec", help=help)


def _meaning(value: Any) -> Any:
    """A plan without its texts and places: comments and spaces may change while a run rests."""
    if isinstance(value, dict):
        return {name: _meaning(item) for name, item in value.items() if name not in ("place", "spec", "file")}
    return [_meaning(item) for item in value] if isinstance(value, (list, tuple)) else value
