"""What the verbs share: the `--format` option, diagnostics on standard error or as JSON, and how files are written."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from surgery.cli.words import one_of
from surgery.compiler.diagnostics import Diagnostic, SurgError, fail, render

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.compiler.plan import Plan
    from surgery.runtime.data import Data
    from surgery.runtime.step import TrainingStep

WIDE = 320  # columns of a table that goes to a file or a pipe, where nothing has to be wrapped


class Format(StrEnum):
    """How a verb answers."""

    text = "text"
    json = "json"


FormatOption = Annotated[
    Format, typer.Option("--format", help="text for people; json: one object on standard output", **one_of(Format))
]
CodeOption = Annotated[
    bool, typer.Option("--allow-code", help='allow `model python "pkg.module:factory"`, which runs that code')
]


def _usable(device: str | None) -> str | None:
    from surgery.runtime.devices import why_not

    if device is not None and (reason := why_not(device)):
        raise typer.BadParameter(reason)
    return device


DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, ...; left out: a GPU if there is one", show_default=False,
                 callback=_usable),
]  # fmt: skip
VerboseOption = Annotated[
    bool, typer.Option("-v", "--verbose", help="one line per pass on standard error: its number, seconds, what it gave")
]
SpecArgument = Annotated[Path, typer.Argument(metavar="SPEC", help="a .surg file", show_default=False)]
BestOption = Annotated[
    bool, typer.Option("--best", help="the state of the run's best evaluation (`best = ...` in its spec), not the last")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder of `surgery train`", show_default=False)]


class Scope(StrEnum):
    """What a method is applied to."""

    graph = "graph"
    module = "module"


ScopeOption = Annotated[
    Scope | None,
    typer.Option("--scope", help="graph: the captured model, whole on each process; module: its modules in place, "
                 "frozen weights spread over processes; left out: graph, or that of the run", show_default=False,
                 **one_of(Scope)),
]  # fmt: skip


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(version("surg"))
        except PackageNotFoundError:  # a checkout on the path, not installed
            typer.echo("not installed")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of the command itself, before any verb."""


def output() -> Console:
    """Standard output: as wide as the terminal, or wide enough for any table in a file."""
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)


def errors() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """A line for people, on standard error."""
    errors().print(Text(message))


def answer(value: Any) -> None:
    """The one JSON object of a verb, on standard output."""
    typer.echo(json_text(value))


def json_text(value: Any) -> str:
    """A value as JSON on one line. Numbers that JSON has no form for become null."""
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def as_json(diagnostics: Iterable[Diagnostic]) -> dict[str, Any]:
    """The public JSON form of diagnostics."""
    return {"diagnostics": [diagnostic.as_dict() for diagnostic in diagnostics]}


def show(diagnostics: Iterable[Diagnostic]) -> None:
    """Diagnostics for people, on standard error, in colour on a terminal."""
    console = errors()
    for diagnostic in diagnostics:
        text = Text(render(diagnostic))
        head = f"{diagnostic.severity}[{diagnostic.code}]"
        text.stylize("bold red" if diagnostic.severity == "error" else "bold yellow", 0, len(head))
        text.highlight_regex(r"(?m)^\s+\|\s+\^+$", "red")
        text.highlight_regex(r"(?m)^  (note|help):", "bold cyan")
        console.print(text, end="\n\n")


def stop(diagnostics: Iterable[Diagnostic], format: Format) -> NoReturn:
    """End the verb with diagnostics: exit status 1."""
    if format is Format.json:
        answer(as_json(diagnostics))
    else:
        show(diagnostics)
    raise typer.Exit(1)


@contextmanager
def reporting(format: Format) -> Iterator[None]:
    """Everything that is the input's fault ends as diagnostics and exit status 1, never as a traceback."""
    try:
        with _warnings_as_they_are():
            yield
    except SurgError as error:
        stop(error.diagnostics, format)
    except BrokenPipeError:
        # Whoever read us has seen enough (`surgery plan ... | head`); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        where = f"`{error.filename}`: " if error.filename else ""
        stop([Diagnostic("SURG011", f"{where}{error.strerror or error}")], format)


@contextmanager
def _warnings_as_they_are() -> Iterator[None]:
    """Inside, a diagnostic that is given as a Python warning is shown without the line of code that gave it."""
    known = warnings.formatwarning

    def shown(message: Any, *place: Any, **more: Any) -> str:
        return f"{message}\n" if str(message).startswith("warning[SURG") else known(message, *place, **more)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = known


@contextmanager
def pass_log(wanted: bool) -> Iterator[None]:
    """Show a line for every pass that runs inside, on standard error, if that is wanted."""
    if not wanted:
        yield
        return
    from surgery.compiler.pass_log import listening

    with listening(note):
        yield


def check_output(folder: Path) -> None:
    """Refuse what no run may be written to: a file, and a folder that is no run but holds files of a run's names."""
    from surgery.runtime.run_folder import STATE_FILES, is_run

    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"`{folder}` is a file; name a folder", param_hint="-o")
    taken = [name for name in STATE_FILES if (folder / name).exists()]
    if taken and not is_run(folder):
        message = f"`{folder}` is no run, and its {', '.join(taken)} would be replaced; choose another folder"
        raise typer.BadParameter(message, param_hint="-o")


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: a crash leaves the old one."""
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8", newline="")
    if path.exists():
        os.chmod(temporary, path.stat().st_mode)
    os.replace(temporary, path)


def quiet() -> None:
    """Keep the loading chatter of libraries off the terminal: what matters of it comes back as diagnostics."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def chosen(run: Path, best: bool) -> Path:
    """The folder of a run's last state, or of its best; SURG054 where it keeps none."""
    from surgery.runtime.best import BEST
    from surgery.runtime.run_folder import is_run, load_state

    if not best:
        return run
    if not is_run(run / BEST):
        load_state(run)  # what is wrong with the run itself comes first
        help = "write `best = loss` and `evaluate = every(100)` in the step block: then the best state is kept"
        raise fail("SURG054", f"`{run}` keeps no best state", help=help)
    return run / BEST


def load_run(run: Path, device: str | None, allow_code: bool) -> TrainingStep:
    """The training step of a run folder."""
    import surgery

    quiet()
    return surgery.load(run, device=device, allow_code=allow_code)


def data_of(plan: Plan, folder: Path, labels: Iterable[str] = ()) -> Data:
    """The data that a plan names, tokenised; its warnings and sizes are shown."""
    from surgery.runtime.data import load_data
    from surgery.runtime.models import load_tokenizer

    quiet()
    data = load_data(plan, folder, load_tokenizer(plan.model, folder), names=tuple(labels))
    show(data.warnings)
    note(data.summary())
    return data


def calibration_of(plan: Plan, folder: Path, data: Data | None = None) -> list[dict[str, Tensor]] | None:
    """The calibration batches of a plan that reads data, from the file that the spec names; None for others."""
    from surgery.runtime.calibrate import calibration_batches
    from surgery.runtime.measure import check_rows

    if plan.data is None or not (plan.measured or any(site.facts.needs_calibration for site in plan.sites)):
        return None
    check_rows(plan, plan.data.calibrate)
    batches = calibration_batches(plan, data_of(plan, folder) if data is None else data)
    for one in plan.measured:
        note(f"{one.call}: the model runs over {sum(len(batch['labels']) for batch in batches):,} rows first")
    return batches
