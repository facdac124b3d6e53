"""The data of a plan for people: what the first rows say about a step, and one of them as the model sees it."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from surgery.compiler.plan import DataPlan, ExampleRow, Plan, SamplePlan

SHOWN = 1500  # characters of the example
INVISIBLE = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), 127)}  # could change the terminal


def print_sample(console: Console, plan: Plan) -> None:
    """Print what was read of the data, if it was."""
    if plan.data is None or plan.sample is None:
        return
    console.print(Text(f"data: {plan.data.path}, {_read(plan.sample)}"))
    for line in (*_lengths(plan.sample, plan.data), _step(plan, plan.data, plan.sample)):
        console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))
    causal = plan.model.task == "causal_lm"
    console.print(Padding(Text(_title(plan.sample.example, causal)), (0, 0, 0, 2), expand=False))
    console.print(Padding(_example(plan.sample.example, causal), (0, 0, 0, 4), expand=False))
    console.print()


def _read(sample: SamplePlan) -> str:
    return f"{sample.rows:,} rows" if sample.whole else f"of which the first {sample.rows:,} rows were read"


def _lengths(sample: SamplePlan, data: DataPlan) -> list[str]:
    longest = f"{sample.longest:,} before any is cut" if sample.cut else f"{sample.longest:,}"
    line = f"tokens of a row: {sample.tokens:,.0f} on average, the median {sample.median:,}, the longest {longest}"
    if sample.example.label is None:
        line += f"; {sample.learned:,.0f} of them are learnt ({sample.learned / sample.tokens:.0%})"
    counts = {
        "longer than max_length and left out": sample.too_long,
        f"cut to {data.max_length:,} tokens": sample.cut,
        "without anything to learn and left out": sample.empty,
    }
    said = [f"{count:,} {what}" for what, count in counts.items() if count]
    return [line, f"rows: {', '.join(said)}"] if said else [line]


def _step(plan: Plan, data: DataPlan, sample: SamplePlan) -> str:
    about = "" if sample.whole else "about "
    rows = f"a batch of {plan.step.batch:,} rows"
    if data.pack:
        rows += f" of up to {data.max_length:,} tokens, {about}{sample.documents:,.1f} documents in each"
    line = f"{rows}: {about}{sample.tokens_per_step:,.0f} tokens a step"
    if sample.example.label is None:
        line += f", {sample.learned_per_step:,.0f} of them learnt"
    line += f"; {sample.padding:.1%} of the batch is padding"
    return line if sample.steps_per_epoch is None else f"{line}; {sample.steps_per_epoch:,} steps an epoch"


def _title(example: ExampleRow, causal: bool) -> str:
    label = f", label {example.label}" if example.label is not None else ""
    learned = f", of which the {example.learned:,} between « and » are learnt" if causal else ""
    return f"row {example.row} as the model sees it, {example.tokens:,} tokens{learned}{label}:"


def _example(example: ExampleRow, causal: bool) -> Text:
    text, left = Text(), SHOWN
    for part in example.parts:
        shown = part.text if len(part.text) <= left else f"{part.text[:left]} ..."
        shown = shown.translate(INVISIBLE)
        text.append(f"«{shown}»" if part.learned and causal else shown, style="bold" if part.learned else "")
        left -= len(part.text)
        if left <= 0:
            break
    return text
