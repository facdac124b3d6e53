"""What `surgery plan` says of the data: against the whole data, against the batches of the run, and when it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from surgery.cli import main
from surgery.compiler.plan import SamplePlan
from surgery.runtime.data import Stream, load_data
from surgery.runtime.data.sample import sample
from tests.surgery.data.test_chat import CHAT, MARKED, plan
from tests.surgery.data.test_load import plan as labelled_plan
from tests.tokenizer import byte_level

QUESTIONS = ["one", "two three", "four five six seven", "eight nine ten eleven twelve thirteen", "sixteen " * 9]
CHATS = [
    [{"role": "user", "content": QUESTIONS[number % 5]}, {"role": "assistant", "content": QUESTIONS[number % 3]}]
    for number in range(40)
]


def write(folder: Path, *chats: Any) -> None:
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def found(folder: Path, rows: int = 512, batch: int = 6, **data: Any) -> SamplePlan:
    asked = plan(**data)
    return sample(
        asked.model_copy(update={"step": asked.step.model_copy(update={"batch": batch})}), folder, byte_level(), rows
    )[0]


@pytest.mark.parametrize("packed", [False, True])
def test_the_statistics_are_those_of_the_batches(packed: bool, tmp_path: Path) -> None:
    write(tmp_path, *CHATS)
    block = {"max_length": 64, "pack": packed}
    said = found(tmp_path, **block)
    data = load_data(plan(**block), tmp_path, byte_level())
    stream = Stream(data.train, 6, 0)
    batches = [stream.batch(step) for step in range(stream.batches_per_epoch)]
    tokens = sum(map(data.train.length, range(len(data.train))))
    learned = sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches)
    places = sum(batch["input_ids"].numel() for batch in batches)
    assert (said.rows, said.whole, said.used, said.steps_per_epoch) == (40, True, 40, len(batches))
    assert said.tokens == pytest.approx(tokens / 40) and said.learned == pytest.approx(learned / 40)
    assert said.padding == pytest.approx(1 - tokens / places)
    assert said.tokens_per_step == pytest.approx(6 * tokens / len(data.train))
    assert said.learned_per_step == pytest.approx(6 * learned / len(data.train))
    assert said.documents == pytest.approx(40 / len(data.train)) and (said.documents > 2) == packed


def test_packing_is_fuller_than_padding(tmp_path: Path) -> None:
    write(tmp_path, *CHATS)
    padded, packed = found(tmp_path, max_length=128), found(tmp_path, max_length=128, pack=True)
    assert packed.padding < 0.1 < padded.padding and packed.tokens_per_step > 2 * padded.tokens_per_step


def test_a_sample_of_many_rows(tmp_path: Path) -> None:
    write(tmp_path, *CHATS * 5)
    some, all_rows = found(tmp_path, 50, max_length=128, pack=True), found(tmp_path, max_length=128, pack=True)
    assert (some.rows, some.whole, some.steps_per_epoch) == (50, False, None)
    assert all_rows.whole and all_rows.steps_per_epoch is not None
    assert some.tokens_per_step == pytest.approx(all_rows.tokens_per_step, rel=0.05)
    assert some.learned == pytest.approx(all_rows.learned, rel=0.05)


def test_the_example_is_marked(tmp_path: Path) -> None:
    write(tmp_path, [], CHAT)
    example = found(tmp_path).example
    assert "".join(f"«{part.text}»" if part.learned else part.text for part in example.parts) == MARKED["chatml"]
    assert example.row == 2 and example.tokens == len(
        byte_level()("".join(part.text for part in example.parts)).input_ids
    )
    assert 0 < example.learned < example.tokens


def test_rows_that_are_left_out_are_counted(tmp_path: Path) -> None:
    write(tmp_path, *CHATS, [], CHAT[:2], [CHAT[1], {"role": "assistant", "content": "one two three " * 40}])
    assert (found(tmp_path, max_length=64).empty, found(tmp_path, max_length=64).cut) == (2, 1)
    dropped = found(tmp_path, max_length=64, too_long="drop")
    assert (dropped.empty, dropped.too_long, dropped.cut, dropped.used) == (2, 1, 0, 40) and dropped.longest > 64


def test_a_sample_may_lack_a_label(tmp_path: Path) -> None:
    rows = [{"text": "one two", "label": "ab"[number > 10]} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = labelled_plan({"path": "rows.jsonl", "label": "label"})
    said = sample(asked, tmp_path, byte_level(), 5)[0]
    assert said.example.label == "a" and said.learned == 1 and not said.example.parts[0].learned


SPEC = """
model config "tiny.json" {{ task = causal_lm  tokenizer = "tokenizer" }}
adapt **.q_proj {{ with lora(rank = 2) }}
data "chat.jsonl" {{ messages = {column}  template = chatml }}
"""
CONFIG = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 400}  # fmt: skip


def planned(folder: Path, capsys: pytest.CaptureFixture[str], column: str = "messages", *more: str) -> tuple[str, str]:
    (folder / "spec.surg").write_text(SPEC.format(column=column))
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    byte_level().save_pretrained(folder / "tokenizer")
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(folder / "spec.surg"), *more])
    assert not ended.value.code
    said = capsys.readouterr()
    return said.out, said.err


def test_the_plan_shows_a_row_for_people_and_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [{"role": "user", "content": "one\x1b[31m"}, CHAT[2]], *CHATS)
    out, _ = planned(tmp_path, capsys)
    assert "data: chat.jsonl, 41 rows" in out and "between « and » are learnt" in out
    assert "«Paris.<|im_end|>" in out and "one\\x1b[31m" in out and "\x1b[31m" not in out
    out, _ = planned(tmp_path, capsys, "messages", "--format", "json")
    said = json.loads(out)["sample"]
    assert said["rows"] == 41 and said["example"]["parts"][1] == {"text": "Paris.<|im_end|>\n", "learned": True}


def test_what_is_wrong_with_the_data_is_a_warning_of_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, CHAT)
    out, log = planned(tmp_path, capsys, "message")
    assert "total: 1 sites" in out and "data:" not in out
    assert "warning[SURG051]" in log and "did you mean `messages`?" in log and "spec.surg:4" in log
    out, log = planned(tmp_path, capsys, "message", "--format", "json")
    assert json.loads(out)["sample"] is None and "SURG051" in log
