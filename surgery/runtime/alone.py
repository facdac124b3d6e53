"""`python step.py --data FILE`: a compiled folder's training step without the command line, with the same losses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import surgery
from surgery.api import _compile
from surgery.compiler.diagnostics import SurgError, render
from surgery.runtime import distributed
from surgery.runtime.calibrate import calibration_batches
from surgery.runtime.data import lengths_of, load_data
from surgery.runtime.devices import why_not
from surgery.runtime.models import load_tokenizer
from surgery.runtime.run_folder import load_state
from surgery.runtime.train import train


def main(path: str, arguments: Sequence[str] | None = None) -> int:
    """Run the step.py at `path` from its folder's start, a line per logged step; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python {Path(path).name}",
        description="Run this training step over a data file, with the plan and the start of its folder.",
    )
    parser.add_argument("--data", metavar="FILE", help="rows to train on; left out: the file that the spec names")
    parser.add_argument("--output", metavar="RUN", help="write a run folder; left out: nothing is written")
    parser.add_argument("--device", help="cpu, cuda, ...; left out: a GPU if there is one")
    options = parser.parse_args(arguments)
    if options.device is not None and (reason := why_not(options.device)):
        parser.error(f"argument --device: {reason}")
    try:
        with distributed.joined(options.device), distributed.heard_once():
            own = distributed.local_device() if distributed.processes() > 1 else None
            _run(Path(path).resolve().parent, options.data, options.output, options.device or own)
    except SurgError as error:
        print(*map(render, error.diagnostics), sep="\n\n", file=sys.stderr)
        return 1
    return 0


def _run(folder: Path, file: str | None, output: str | None, device: str | None) -> None:
    state = load_state(folder)
    tokenizer = load_tokenizer(state.plan.model, state.folder)
    data = load_data(state.plan, state.folder, tokenizer, file, tuple(state.extra.get("labels", ())))
    print(data.summary(), file=sys.stderr)
    if state.step == 0:
        step = surgery.load(folder, device=device)
    else:  # a trained run holds its end: the start is made again
        program = surgery.parse(state.spec, state.folder, state.plan.file)
        reads_data = any(site.facts.needs_calibration for site in state.plan.sites)
        batches = calibration_batches(state.plan, data) if reads_data else None
        step = _compile(program, None, None, device, batches, measured=state.plan.measured, allow_code=False)
    # The file itself runs, also when somebody has edited it.
    step.use_source(state.source)
    step.lengths = lengths_of(step.plan, len(data.train))
    run = None if output is None else Path(output)
    outcome = train(step, data, run, log=lambda text: print(text, flush=True))
    print(f"{outcome.done} of {outcome.steps} steps in {outcome.seconds:.0f} s", file=sys.stderr)
