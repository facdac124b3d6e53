"""What the first rows of a plan's data say: tokens, how full a step's batch is, and one row as the model sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any

from surgery.compiler.plan import ExamplePart, ExampleRow, Plan, SamplePlan
from surgery.runtime.data.examples import Examples
from surgery.runtime.data.packing import Packed, pack
from surgery.runtime.data.reader import Documents, Reader
from surgery.runtime.data.stream import Stream

ROWS = 512


def sample(plan: Plan, folder: Path, tokenizer: Any, rows: int = ROWS) -> tuple[SamplePlan, Reader]:
    """The first `rows` rows of what the plan trains on, and the reader with its warnings.

    The same number of the rows to evaluate on is read too, to see that they can be. Raises as `load_data`.
    """
    reader = Reader(plan, folder, tokenizer, limit=rows)
    documents = reader.documents(reader.training())
    parts = [documents]
    if (evaluation := reader.evaluation()) is not None:
        parts.append(reader.documents(evaluation))
    names = reader.label_names(parts, ())
    trained = reader.split(documents)[0] if reader.data.holdout and documents.whole else documents
    examples = reader.examples(trained, names)
    return _statistics(plan, documents, examples, _example(documents, reader)), reader


def _statistics(plan: Plan, read: Documents, documents: Examples, example: ExampleRow) -> SamplePlan:
    data, batch = plan.data, plan.step.batch
    assert data is not None
    examples: Examples | Packed = pack(documents, data.max_length) if data.pack else documents
    lengths = list(map(documents.length, range(len(documents))))
    learned = sum(map(documents.label_count, range(len(documents))))
    chosen: Sequence[int] = range(len(examples))
    if isinstance(examples, Packed) and not read.whole and len(examples) > 1:
        # The last row is filled by what comes after the sample.
        emptiest = min(chosen, key=examples.length)
        chosen = [row for row in chosen if row != emptiest]
    stream = Stream(examples, batch, plan.step.seed)
    batches = [stream.rows(step) for step in range(stream.batches_per_epoch)]
    batches = [[row for row in rows if row in set(chosen)] for rows in batches]
    longest = examples.longest if isinstance(examples, Packed) else 0
    places = sum(len(rows) * (longest or max(map(examples.length, rows))) for rows in batches if rows)
    tokens = sum(map(examples.length, chosen))
    in_step = min(batch, len(examples)) if read.whole else batch
    return SamplePlan(
        rows=read.read, whole=read.whole, used=len(read.tokens),
        empty=read.empty.count + read.silent.count + read.cut_off.count,
        too_long=read.long.count if data.too_long == "drop" else 0,
        cut=read.long.count - read.cut_off.count if data.too_long == "truncate" else 0,
        longest=read.longest, median=math.ceil(median(lengths)),
        tokens=sum(lengths) / len(documents), learned=learned / len(documents),
        documents=len(documents) / len(examples),
        tokens_per_step=in_step * tokens / len(chosen),
        learned_per_step=in_step * sum(map(examples.label_count, chosen)) / len(chosen),
        padding=1 - tokens / places, steps_per_epoch=stream.batches_per_epoch if read.whole else None, example=example,
    )  # fmt: skip


def _example(documents: Documents, reader: Reader) -> ExampleRow:
    """The first row, in parts that are learnt and parts that are not."""
    tokens = documents.tokens[0]
    causal = reader.causal
    learned = tokens.learned if tokens.learned is not None else bytes([causal]) * len(tokens.ids)
    ends = [0]
    for _, run in groupby(learned):
        ends.append(ends[-1] + len(list(run)))
    # Up to each end, as a whole: some tokenizers leave out a space where a text begins.
    texts = [reader.tokenizer.decode(tokens.ids[:end].tolist()) for end in ends]
    parts = [
        ExamplePart(text=texts[place + 1][len(texts[place]) :], learned=bool(learned[start]))
        for place, (start, _) in enumerate(pairwise(ends))
    ]
    return ExampleRow(
        row=documents.first, tokens=len(tokens.ids), learned=sum(learned[1:]) if causal else 1,
        label=str(documents.labels[0]) if documents.labels else None, parts=tuple(parts),
    )  # fmt: skip
