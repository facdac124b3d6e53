"""`surgery generate`: a run continues a text, or answers a conversation."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.common import (
    BestOption,
    CodeOption,
    DeviceOption,
    Format,
    FormatOption,
    RunArgument,
    answer,
    chosen,
    quiet,
    reporting,
    show,
)

EXAMPLE = 'Example: surgery generate runs/sft --prompt "Once upon a time" --max-new-tokens 40'
NEEDS_ARGUMENTS = True


def run(
    run: RunArgument,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="the text to continue, as it is", show_default=False)
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option("--messages", metavar="JSON|FILE", show_default=False,
                     help="a conversation to answer, through the chat template of the run's data or its tokenizer"),
    ] = None,
    limit: Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="at most so many tokens", min=1)] = 256,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="draw at this temperature; left out: the likeliest token each", min=0.0,
                     show_default=False),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="SHARE", min=0.0, max=1.0, show_default=False,
                     help="draw from the likeliest tokens that have this share of the probability together"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="of what is drawn", min=0)] = 0,
    best: BestOption = False,
    device: DeviceOption = None,
    format: FormatOption = Format.text,
    allow_code: CodeOption = False,
) -> None:  # fmt: skip
    """Generate text from a run of a causal model, as it comes.

    The method's tensors stay beside the weights: nothing is merged.
    """
    if (prompt is None) == (messages is None):
        raise typer.BadParameter("give --prompt TEXT or --messages JSON, one of them", param_hint="--prompt")
    given = (prompt or "") if messages is None else _messages(messages)
    if temperature is None:
        temperature = 0.0 if top_p is None else 1.0
    with reporting(format):
        import torch

        from surgery.compiler.diagnostics import Diagnostic
        from surgery.runtime.generate import generate, load_speaker

        quiet()
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        run = chosen(run, best)
        speaker = load_speaker(run, place, allow_code=allow_code)
        said = _say if format is Format.text else None
        share = 1.0 if top_p is None else top_p
        found = generate(speaker, given, limit=limit, temperature=temperature, top_p=share, seed=seed, said=said)
        if format is Format.json:
            answer({"run": str(run), **asdict(found)})
        else:
            typer.echo("")
        if found.ended == "positions":
            message = f"the text ends at the last of the model's {speaker.positions:,} positions"
            show([Diagnostic("SURG070", message, severity="warning")])


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _messages(text: str) -> list[dict[str, Any]]:
    """A conversation from JSON, or from a file of it."""
    shape = 'a conversation is [{"role": "user", "content": "..."}]'
    try:
        found = json.loads(text if text.lstrip().startswith("[") else Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"`{text}`: {error.strerror}; {shape}", param_hint="--messages") from error
    except ValueError as error:
        raise typer.BadParameter(f"no JSON: {error}; {shape}", param_hint="--messages") from error
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) and "role" in one for one in found):
        raise typer.BadParameter(shape, param_hint="--messages")
    return found
