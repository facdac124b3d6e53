"""Data files: what is read, in which order, and how every fault is reported."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.compiler.diagnostics import SurgError
from surgery.compiler.plan import DataPlan, ModelPlan, Place, Plan, StepPlan, Totals
from surgery.runtime.data import IGNORED, Stream, lengths_of, load_data, load_evaluation


class Letters:
    """A tokenizer of letters: 1, then one token per character, then 2; as in BERT the last token survives a cut."""

    pad_token_id = 0
    eos_token_id = 2

    def __call__(
        self, texts: list[str], truncation: bool = False, max_length: int = 0, verbose: bool = True
    ) -> dict[str, list[list[int]]]:
        rows = [[1, *map(ord, text), 2] for text in texts]
        return {"input_ids": [row[: max_length - 1] + [2] if truncation else row for row in rows]}


def plan(data: dict[str, Any], task: str = "sequence_classification", labels: int | None = 2, **step: Any) -> Plan:
    return Plan(
        spec="", file="demo.surg", sites=(), formulas={}, tokens=0,
        model=ModelPlan(source="hub", name="tiny", task=task, labels=labels),
        step=StepPlan(**step), data=DataPlan(**data),
        totals=Totals(sites=0, trainable=0, frozen=0, model=1, share=0.0),
    )  # fmt: skip


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path.name


ROWS = [{"text": f"row {number}", "label": "ab"[number % 2]} for number in range(10)]


def test_rows_become_padded_batches(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", [{"q": "ab", "c": None, "l": "yes"}, {"q": "\u2028x", "c": 7, "l": "no"}])
    data = load_data(plan({"path": name, "text": "{q}{c}{{", "label": "l"}), tmp_path, Letters())
    batch = data.train.batch([0, 1])
    assert batch["input_ids"].tolist() == [[1, 97, 98, 123, 2, 0], [1, 0x2028, 120, 55, 123, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0] and data.names == ("no", "yes")


def test_gzip_and_csv_read_the_same_rows(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    (tmp_path / "rows.csv").write_text("\ufefftext,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in ROWS))
    read = [load_data(plan({"path": name, "label": "label"}), tmp_path, Letters())
            for name in ("rows.jsonl", "rows.jsonl.gz", "rows.csv")]  # fmt: skip
    assert read[0].train == read[1].train == read[2].train
    assert read[0].fingerprint() == read[2].fingerprint()


def test_causal_rows_are_their_own_labels(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", [{"text": "abcd"}, {"text": "a"}])
    data = load_data(plan({"path": name, "max_length": 4}, "causal_lm", None), tmp_path, Letters())
    assert data.cut == 1
    batch = data.train.batch([0, 1])
    assert batch["input_ids"].tolist() == [[1, 97, 98, 2], [1, 97, 2, 0]]
    assert batch["labels"].tolist() == [[1, 97, 98, 2], [1, 97, 2, IGNORED]]


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    data = load_data(plan({"path": write(tmp_path / "r.jsonl", ROWS), "label": "label"}), tmp_path, Letters())
    stream = Stream(data.train, 4, seed=3)
    assert stream.batches_per_epoch == 3 and stream.position(7) == (2, 1)
    assert sorted(stream.order(0)) == list(range(10)) and stream.order(0) != stream.order(1)
    assert [len(stream.batch(step)["labels"]) for step in range(4)] == [4, 4, 2, 4]
    other = Stream(data.train, 4, seed=3)  # a resumed run starts anywhere
    assert torch.equal(other.batch(7)["input_ids"], stream.batch(7)["input_ids"])
    assert Stream(data.train, 4, seed=4).order(0) != stream.order(0)


def test_holdout_is_chosen_by_the_seed_and_disjoint(tmp_path: Path) -> None:
    block = {"path": write(tmp_path / "r.jsonl", ROWS), "label": "label", "holdout": 0.3}
    first, again = (load_data(plan(block, seed=1), tmp_path, Letters()) for _ in range(2))
    other = load_data(plan(block, seed=2), tmp_path, Letters())
    assert first == again and first.train != other.train
    assert first.held_out is not None and len(first.held_out) == 3 and len(first.train) == 7
    assert not set(map(tuple, first.held_out.tokens)) & set(map(tuple, first.train.documents.tokens))


def test_an_evaluation_file_shares_the_labels(tmp_path: Path) -> None:
    block = {
        "path": write(tmp_path / "r.jsonl", ROWS),
        "label": "label",
        "eval": write(tmp_path / "e.jsonl", ROWS[1:2]),
    }
    data = load_data(plan(block), tmp_path, Letters())
    assert data.held_out is not None and data.held_out.labels == (1,)
    assert load_evaluation(plan(block), tmp_path, Letters(), tmp_path / "e.jsonl", data.names).labels == (1,)


def test_labels_that_are_numbers_keep_their_order_and_one_label_is_a_regression(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": number} for number in range(11)]
    block = {"path": write(tmp_path / "r.jsonl", rows), "label": "label"}
    assert load_data(plan(block, labels=11), tmp_path, Letters()).train.labels == tuple(range(11))
    regression = load_data(plan(block, labels=1), tmp_path, Letters())
    assert regression.train.batch([3])["labels"].tolist() == [3.0] and regression.names == ()


def test_steps_come_from_the_plan_or_the_epochs() -> None:
    assert lengths_of(plan({"path": "x"}, steps=225), 10) == (225,)
    assert lengths_of(plan({"path": "x"}, epochs=1.5, batch=4), 10) == (5,)
    assert lengths_of(plan({"path": "x"}, batch=4), 10) == (3,)


def test_rows_without_text_are_left_out_with_a_warning(tmp_path: Path) -> None:
    name = write(tmp_path / "r.jsonl", [*ROWS, {"text": "  ", "label": "a"}, {"text": "x", "label": None}])
    data = load_data(plan({"path": name, "label": "label"}), tmp_path, Letters())
    assert len(data.train) == 10 and [w.code for w in data.warnings] == ["SURG057"]
    assert "2 of 12" in data.warnings[0].message and "the first is row 11" in data.warnings[0].message


def errors(folder: Path, block: dict[str, Any], **settings: Any) -> tuple[str, str]:
    with pytest.raises(SurgError) as caught:
        load_data(plan(block, **settings), folder, Letters())
    (found,) = caught.value.diagnostics
    return found.code, str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.jsonl", b'{"text": "a", "label": "b"}\n{"text": \n', "row 2: not JSON"),
        ("r.jsonl", b"[1]\n", "row 1: not a JSON object"),
        ("r.jsonl", b'{"text": "\xff"}\n', "row 1: not UTF-8"),
        ("r.jsonl", b"[" * 200_000, "row 1: not JSON"),
        ("r.jsonl.gz", b"plain text", "cannot be read"),
        ("r.jsonl.gz", gzip.compress(b'{"text": "a", "label": "b"}\n' * 9, mtime=0)[:-9], "cannot be read"),
        ("r.csv", b"text,label\na\n", "row 1: 1 fields where the header has 2"),
        ("r.csv", b"text,text\na,b\n", "each once"),
        ("r.csv", b'text,label\n"a"x,b\n', "row 1: not CSV"),
        ("r.csv", b"text,label\n\xff,b\n", "not UTF-8"),
        ("r.parquet", b"", "not Parquet"),
        ("r.txt", b"", "known here: .jsonl"),
    ],
)
def test_unreadable_rows_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    code, text = errors(tmp_path, {"path": name, "label": "label"})
    assert code == "SURG050" and words in text and name in text


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert errors(tmp_path, {"path": "none.jsonl", "label": "l"})[0] == "SURG050"
    (tmp_path / "dir.csv").mkdir()
    assert "a folder" in errors(tmp_path, {"path": "dir.csv", "label": "l"})[1]


def test_a_missing_column_lists_the_columns_and_the_nearest(tmp_path: Path) -> None:
    block = {"path": write(tmp_path / "r.jsonl", ROWS), "text": "{texts}", "label": "label"}
    code, text = errors(tmp_path, block)
    assert code == "SURG051" and "text, label" in text and "did you mean `text`?" in text
    assert "row 1" in text


@pytest.mark.parametrize(
    ("rows", "labels", "words"),
    [
        ([], 2, "no usable rows: there are none at all"),
        ([{"text": "", "label": "a"}], 2, "1 of 1 have no text or no label"),
        (ROWS, 3, "column `label` has 2 labels, the model 3: a, b"),
        ([{"text": "a", "label": "some \n" + "word " * 99}], 2, "2: some word word word word word word wo..."),
    ],
)
def test_no_usable_rows(tmp_path: Path, rows: list[Any], labels: int, words: str) -> None:
    code, text = errors(tmp_path, {"path": write(tmp_path / "r.jsonl", rows), "label": "label"}, labels=labels)
    assert code == "SURG052" and words in text


def test_values_that_are_no_text(tmp_path: Path) -> None:
    name = write(tmp_path / "r.jsonl", [{"text": ["a"], "label": {"a": 1}}])
    assert "holds a list" in errors(tmp_path, {"path": name, "label": "label"})[1]
    assert "the label is a dict" in errors(tmp_path, {"path": name, "text": "x", "label": "label"})[1]


def test_errors_quote_the_spec(tmp_path: Path) -> None:
    (tmp_path / "demo.surg").write_text('model "tiny"\ndata "none.jsonl" { label = l }\n')
    place = Place(file="demo.surg", line=2, column=1, start=13, end=30)
    text = errors(tmp_path, {"path": "none.jsonl", "label": "l", "place": place})[1]
    assert "--> demo.surg:2:1" in text and "^^^" in text
    (tmp_path / "demo.surg").unlink()
    assert "asked for at demo.surg:2:1" in errors(tmp_path, {"path": "none.jsonl", "label": "l", "place": place})[1]
