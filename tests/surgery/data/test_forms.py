"""Texts and completions as tokens: where they end, what is learnt, where a prompt stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from surgery.compiler.diagnostics import SurgError
from surgery.runtime.data import IGNORED, Data, load_data
from tests.surgery.data.test_chat import marked, plan
from tests.tokenizer import byte_level


def read(folder: Path, *rows: dict[str, Any], tokenizer: Any = None, **data: Any) -> Data:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    block = {"path": "rows.jsonl", "messages": None, "loss": "all", **data}
    return load_data(plan(**block), folder, tokenizer or byte_level())


COMPLETION = {"prompt": "Q: {q}\nA:", "completion": " {a}", "loss": "completion"}
ROW = {"q": "one two", "a": "three"}


def test_a_text_ends_with_the_end_of_text_once(tmp_path: Path) -> None:
    found = read(tmp_path, {"text": "one two"}, {"text": "three</s>"})
    assert marked(found.train.documents) == "«one two</s>»"
    assert marked(found.train.documents, 1) == "«three</s>»"
    # A text that is cut has not ended.
    cut = read(tmp_path, {"text": "one two three four five six seven"}, max_length=3)
    assert cut.cut == 1 and len(cut.train.documents.tokens[0]) == 3 and "</s>" not in marked(cut.train.documents)


def test_without_an_end_of_text_nothing_is_added(tmp_path: Path) -> None:
    tokenizer = byte_level(eos_token=None, pad_token=None)
    found = read(tmp_path, {"text": "one two"}, tokenizer=tokenizer)
    assert marked(found.train.documents, tokenizer=tokenizer) == "«one two»" and found.train.documents.padding == 0


def test_a_completion_is_learnt_with_its_end(tmp_path: Path) -> None:
    found = read(tmp_path, ROW, **COMPLETION)
    assert marked(found.train.documents) == "Q: one two\nA:« three</s>»"
    batch = found.train.batch([0])
    assert batch["labels"][0, 0] == IGNORED and batch["labels"][0, -1] == batch["input_ids"][0, -1]
    everything = read(tmp_path, ROW, **{**COMPLETION, "loss": "all"})
    assert marked(everything.train.documents) == "«Q: one two\nA: three</s>»"


def test_the_prompt_is_what_generation_starts_from(tmp_path: Path) -> None:
    tokenizer = byte_level()
    # Together the space and the word are one token, which a model that is given the prompt alone cannot say.
    assert len(tokenizer("A: three")["input_ids"]) < len(tokenizer("A: ")["input_ids"]) + 1 + len("three")
    row = {"q": "A: ", "a": "three"}
    found = read(tmp_path, row, prompt="{q}", completion="{a}", loss="completion").train.documents
    prompt = tokenizer("A: ")["input_ids"]
    assert list(found.tokens[0][: len(prompt)]) == prompt and marked(found) == "A: «three</s>»"
    joined = read(tmp_path, row, prompt="{q}", completion="{a}", loss="completion").train.documents
    assert list(joined.tokens[0]) != tokenizer("A: three</s>")["input_ids"]


def test_a_tokenizer_s_own_end_of_the_prompt_is_left_out(tmp_path: Path) -> None:
    class Ending:
        eos_token_id, pad_token_id = 2, 0

        def __call__(self, texts: list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
            return {
                "input_ids": [[1, *map(ord, text), 2] if add_special_tokens else [*map(ord, text)] for text in texts]
            }

    found = read(tmp_path, {"q": "ab", "a": "c"}, prompt="{q}", completion="{a}", loss="completion", tokenizer=Ending())
    assert list(found.train.documents.tokens[0]) == [1, 97, 98, 99, 2]
    assert found.train.documents.learned == (bytes([0, 0, 0, 1, 1]),)


def test_rows_without_a_completion_are_left_out(tmp_path: Path) -> None:
    found = read(tmp_path, ROW, {"q": "one", "a": None}, {"q": None, "a": "two"}, **{**COMPLETION, "completion": "{a}"})
    assert len(found.train) == 2 and "1 of 3 rows have no completion" in found.warnings[0].message
    assert marked(found.train.documents, 1) == "Q: \nA:«two</s>»"


def test_a_completion_that_is_cut_off(tmp_path: Path) -> None:
    found = read(tmp_path, ROW, {"q": "one two three four five", "a": "six"}, max_length=12, **COMPLETION)
    assert found.cut == 0 and len(found.train) == 1
    assert "1 of 2 rows have no token left that `loss = completion` learns after they are cut to 12" in (
        found.warnings[0].message
    )


@pytest.mark.parametrize(("name", "words"), [("q", "did you mean"), ("none", "the columns are: q, a")])
def test_a_column_that_is_not_there(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SurgError) as raised:
        read(tmp_path, {"qq": "x", "a": "y"} if name == "q" else ROW, prompt=f"{{{name}}}", completion="{a}")
    assert "SURG051" in str(raised.value) and "row 1" in str(raised.value) and words in str(raised.value)
