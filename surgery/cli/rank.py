"""`surgery rank`: which rank the difference of two models needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn

from surgery.analysis.norms import Norm
from surgery.cli.common import (
    DeviceOption,
    Format,
    FormatOption,
    answer,
    as_json,
    errors,
    json_text,
    output,
    quiet,
    reporting,
    show,
    write_text,
)
from surgery.cli.export import Dtype
from surgery.cli.words import known_task, one_of
from surgery.compiler.diagnostics import fail

if TYPE_CHECKING:
    from surgery.analysis.compare import Comparison

EXAMPLE = "Example: surgery rank base tuned --tolerance 0.1 --plot spectra.png --adapters adapter"
NEEDS_ARGUMENTS = True
PATTERN = "names or patterns of weights, or of their modules"


def _endings(files: list[Path]) -> list[Path]:
    for file in files:
        if file.suffix.lower() not in (".png", ".svg"):
            raise typer.BadParameter(f"`{file}` has to end in .png or .svg")
    return files


def run(
    base: Annotated[str, typer.Argument(metavar="BASE", help="a model: its folder, hub id or .safetensors file",
                                        show_default=False)],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="another one, a run, or an adapter of peft",
                                          show_default=False)],
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0.0, help="what may be missing, as a share of the change")
    ] = 0.05,
    norm: Annotated[Norm, typer.Option("--norm", help="in which that is measured", **one_of(Norm))] = Norm.spectral,
    absolute: Annotated[bool, typer.Option("--absolute", help="the tolerance is a number, not a share")] = False,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, show_default=False,
                     help="tell what this rank leaves, and construct adapters of it; left out: what suffices"),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option("--group", metavar="PRODUCT", show_default=False,
                     help='weights that are multiplied with nothing in between: "layers.1 @ layers.0"; '
                          'of another depth in the target: "layers.1 @ layers.0 = layers.0"'),
    ] = None,
    per_head: Annotated[
        bool, typer.Option("--per-head", help="groups are of two weights of an attention: take its heads one by one")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PATTERN", show_default=False, help=f"compare these: {PATTERN}"),
    ] = None,
    leave: Annotated[
        list[str] | None, typer.Option("--except", metavar="PATTERN", show_default=False, help="leave these out")
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option("--adapters", metavar="DIR", show_default=False,
                     help="write the constructed adapters, as an adapter of peft"),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="of the adapters, rounded once from float64", **one_of(Dtype))
    ] = Dtype.float32,
    plot: Annotated[
        list[Path] | None,
        typer.Option("--plot", metavar="FILE", show_default=False, callback=lambda files: _endings(files or []),
                     help="draw the singular values; .png or .svg, may be said twice"),
    ] = None,
    to_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", show_default=False, help="write all figures as JSON")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", show_default=False, help="of the base, where its config does not say it",
                     callback=known_task),
    ] = None,
    device: DeviceOption = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="a row for every weight")] = False,
    format: FormatOption = Format.text,
) -> None:  # fmt: skip
    """Which rank suffices for what a target differs in from a base, for each weight and for products of weights.

    For one weight the best change of rank R leaves the singular value number R + 1 (Eckart and Young); for a product of
    L weights with an adapter of rank R on each, the number RL + 1 (Zeng and Lee, arXiv:2310.17513). Weights are read
    one at a time, and all is computed in float64.
    """
    with reporting(format):
        import torch

        from surgery.analysis.adapted import is_adapted
        from surgery.analysis.adapters import skeleton_for, write_adapters
        from surgery.analysis.checkpoint import open_checkpoint
        from surgery.analysis.compare import compare
        from surgery.analysis.groups import heads_of
        from surgery.analysis.pairs import pair
        from surgery.analysis.plot import draw
        from surgery.analysis.rows import Wanted
        from surgery.runtime.extras import needed

        if adapters is not None and adapters.exists() and not adapters.is_dir():
            raise typer.BadParameter(f"`{adapters}` is a file; name a folder", param_hint="--adapters")
        for file in (*(plot or ()), *([to_json] if to_json else ())):
            if not file.parent.is_dir():
                raise typer.BadParameter(f"there is no folder `{file.parent}`")
        if plot:
            needed("matplotlib", "plot", "a plot")
        if is_adapted(Path(base)):
            help = f"name its model first: surgery rank MODEL {base}; or name what `surgery merge` makes of it"
            raise fail("SURG074", f"`{base}` is a run or an adapter, and the base has to be a model", help=help)
        quiet()
        opened = open_checkpoint(base, task)
        if adapters is not None:  # before anything takes time
            skeleton_for(opened, adapters)
        pairs = pair(opened, target, group or (), only or (), leave or (), task)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        wanted = Wanted(tolerance, norm, absolute, rank)
        with Progress(SpinnerColumn(), TextColumn("{task.completed}/{task.total} {task.description}"),
                      console=errors(), transient=True) as bar:  # fmt: skip
            shown = bar.add_task("", total=len(pairs.weights) + len(pairs.groups))
            found, made = compare(
                base, target, pairs, wanted, place, keep=adapters is not None,
                heads=heads_of(opened) if per_head else None,
                progress=lambda name: bar.update(shown, advance=1, description=name),
            )  # fmt: skip
        warnings = list(found.warnings)
        if adapters is not None:
            warnings += write_adapters(opened, made, pairs, adapters, getattr(torch, dtype))
        if plot:
            draw(found, plot)
        told = found.as_dict() | {"adapters": None if adapters is None else str(adapters)} | as_json(warnings)
        if to_json is not None:
            write_text(to_json, json_text(told) + "\n")
    if format is Format.json:
        answer(told)
    else:
        show(warnings)
        _print(found, verbose, adapters, plot or [], to_json)


def _print(found: Comparison, verbose: bool, adapters: Path | None, plots: list[Path], figures: Path | None) -> None:
    from surgery.cli.rank_table import print_comparison

    print_comparison(output(), found, verbose)
    if adapters is not None:
        typer.echo(f"{adapters}: the adapters; PeftModel.from_pretrained(model, '{adapters}'), or surgery import")
    for file in (*plots, *([figures] if figures else [])):
        typer.echo(str(file))
