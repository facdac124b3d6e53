"""Conversations: which tokens are the assistant's, by hand for three real templates, and what no template can say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.compiler.data_settings import TEMPLATES
from surgery.compiler.diagnostics import SurgError
from surgery.compiler.plan import DataPlan, ModelPlan, Plan, StepPlan, Totals
from surgery.runtime.data import Examples, load_data
from surgery.runtime.data import chat as chat_module
from surgery.runtime.data.fields import Entry
from surgery.runtime.data.files import DataFile
from tests.tokenizer import MARKERS, byte_level, joining

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And how many people live there?"},
    {"role": "assistant", "content": "About two million."},
]

# By hand: between « and » stands what the model is to learn.
MARKED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n«Paris.<|im_end|>\n»"
        "<|im_start|>user\nAnd how many people live there?<|im_end|>\n"
        "<|im_start|>assistant\n«About two million.<|im_end|>\n»"
    ),
    "llama-3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is the capital of France?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Paris.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd how many people live there?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«About two million.<|eot_id|>»"
    ),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nWhat is the capital of France?</s>\n<|assistant|>\n«Paris.</s>\n»"
        "<|user|>\nAnd how many people live there?</s>\n<|assistant|>\n«About two million.</s>\n»"
    ),
    "phi-3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is the capital of France?<|end|>\n"
        "<|assistant|>\n«Paris.<|end|>\n»"
        "<|user|>\nAnd how many people live there?<|end|>\n<|assistant|>\n«About two million.<|end|>\n»"
    ),
    "mistral": (
        "<s>[INST] Be brief.\n\nWhat is the capital of France? [/INST]« Paris.</s>»"
        "[INST] And how many people live there? [/INST]« About two million.</s>»"
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\nWhat is the capital of France?<end_of_turn>\n"
        "<start_of_turn>model\n«Paris.<end_of_turn>\n»"
        "<start_of_turn>user\nAnd how many people live there?<end_of_turn>\n"
        "<start_of_turn>model\n«About two million.<end_of_turn>\n»"
    ),
}

# ChatML as the library itself can mask it, which most templates do not allow.
GENERATION = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{- message['content'] + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{- message['content'] + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# As Qwen 3: the reasoning of an answer is left out once another question follows.
FORGETS = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


def plan(**data: Any) -> Plan:
    block = {"path": "chat.jsonl", "messages": "messages", "template": "chatml", "loss": "assistant", **data}
    return Plan(
        spec="", file="sft.surg", sites=(), formulas={}, tokens=0,
        model=ModelPlan(source="hub", name="tiny", task="causal_lm"),
        step=StepPlan(), data=DataPlan.model_validate(block),
        totals=Totals(sites=0, trainable=0, frozen=0, model=1, share=0.0),
    )  # fmt: skip


def read(folder: Path, *chats: Any, tokenizer: Any = None, **data: Any) -> Examples:
    rows = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    (folder / "chat.jsonl").write_text("".join(rows), encoding="utf-8")
    return load_data(plan(**data), folder, tokenizer or byte_level()).train.documents


def marked(examples: Examples, row: int = 0, tokenizer: Any = None) -> str:
    """A row as text, with what is learnt between « and »."""
    tokenizer = tokenizer or byte_level()
    learned = examples.learned[row] if examples.learned else bytes([1]) * len(examples.tokens[row])
    text, before = "", 0
    for token, now in zip([*examples.tokens[row], None], [*learned, 0], strict=True):
        text += {(0, 1): "«", (1, 0): "»"}.get((before, now), "")
        text += "" if token is None else tokenizer.decode([token])
        before = now
    return text


def test_the_templates_of_the_language_are_those_of_the_folder() -> None:
    assert sorted(TEMPLATES) == sorted(path.stem for path in chat_module.TEMPLATES.glob("*.jinja")) == sorted(MARKED)


@pytest.mark.parametrize("template", MARKED)
def test_what_the_assistant_says_is_learnt(template: str, tmp_path: Path) -> None:
    assert marked(read(tmp_path, CHAT, template=template)) == MARKED[template]


@pytest.mark.parametrize("template", MARKED)
def test_the_last_answer_or_all(template: str, tmp_path: Path) -> None:
    before, _, rest = MARKED[template].partition("«")
    first, _, rest = rest.partition("»")
    assert marked(read(tmp_path, CHAT, template=template, loss="completion")) == before + first + rest
    plain = MARKED[template].replace("«", "").replace("»", "")
    assert marked(read(tmp_path, CHAT, template=template, loss="all")) == f"«{plain}»"


def test_the_mask_is_the_library_s_where_a_template_marks_what_is_generated(tmp_path: Path) -> None:
    tokenizer = byte_level(chat_template=GENERATION)
    said = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    found = read(tmp_path, CHAT, tokenizer=tokenizer, template="tokenizer")
    assert list(found.tokens[0]) == said["input_ids"] and found.learned is not None
    assert list(found.learned[0]) == said["assistant_masks"] and sum(found.learned[0]) > 5
    # A template without such marks, for which the library's mask is empty, gives the same tokens.
    with_markers = read(tmp_path, CHAT)
    assert with_markers.tokens == found.tokens and with_markers.learned == found.learned


def test_a_token_that_the_tokenizer_made_of_both_sides_is_learnt(tmp_path: Path) -> None:
    tokenizer = joining()
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "\n\ntwo"}]
    found = read(tmp_path, chat, tokenizer=tokenizer, template="zephyr")
    # The line that ends the header and the first empty line of the answer are one token.
    assert marked(found, tokenizer=tokenizer) == "<|user|>\none</s>\n<|assistant|>«\n\n\ntwo</s>\n»"


TEXTS = st.text(alphabet=" \n<|/s>INSTaé1", min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=8), st.sampled_from(sorted(MARKED)), st.booleans())
def test_bounds_are_those_of_whole_prefixes(texts: list[str], template: str, joins: bool) -> None:
    """The reference: the tokens of every prefix, compared with those of the whole."""
    tokenizer = joining() if joins else byte_level()
    chat = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    data = plan(template=template).data
    assert data is not None
    form = chat_module.ChatForm(data, tokenizer, lambda *_: SurgError([]))
    entry = Entry(DataFile("chat.jsonl", Path()), 1, {"messages": chat})
    (found,) = form.encode([(entry, chat)])

    def tokens(messages: list[dict[str, str]], prompt: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages, chat_template=form.template, add_generation_prompt=prompt, tokenize=False
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    whole = tokens(chat)
    expected = [0] * len(whole)
    for turn in range(1, len(chat), 2):
        start, end = (
            next(
                (place for place, pair in enumerate(zip(prefix, whole, strict=False)) if pair[0] != pair[1]),
                len(prefix),
            )
            for prefix in (tokens(chat[:turn], prompt=True), tokens(chat[: turn + 1]))
        )
        expected[start:end] = [1] * (end - start)
    assert list(found.ids) == whole and list(found.learned or b"") == expected


def test_learning_needs_something_before_it_and_empty_rows_are_said(tmp_path: Path) -> None:
    rows = [CHAT, [], CHAT[:2], None]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    data = load_data(plan(), tmp_path, byte_level())
    assert len(data.train) == 1
    said = [warning.message for warning in data.warnings]
    assert said == [
        "chat.jsonl: 2 of 4 rows have no messages and are left out; the first is row 2",
        "chat.jsonl: 1 of 4 rows have no token that `loss = assistant` learns and are left out; the first is row 3",
    ]


def test_rows_that_are_too_long(tmp_path: Path) -> None:
    long = [*CHAT[:4], {"role": "assistant", "content": "one two three four five six " * 20}]
    never = [{"role": "user", "content": "one two three " * 60}, CHAT[2]]
    short = len(read(tmp_path, CHAT).tokens[0])
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in (CHAT, long, never)))
    tokenizer = byte_level()
    dropped = load_data(plan(max_length=short, too_long="drop"), tmp_path, tokenizer)
    assert (len(dropped.train), dropped.dropped, dropped.cut, dropped.warnings) == (1, 2, 0, ())
    assert "2 rows longer than max_length left out" in dropped.summary()
    cut = load_data(plan(max_length=short), tmp_path, tokenizer)
    assert (len(cut.train), cut.dropped, cut.cut) == (2, 0, 1) and len(cut.train.documents.tokens[1]) == short
    (warning,) = cut.warnings  # of the third row only the question is left
    assert "1 of 3 rows have no token left" in warning.message and "row 3" in warning.message
    with pytest.raises(SurgError, match=r"(?s)SURG059.*row 2: 2 of 3 rows are longer than max_length"):
        load_data(plan(max_length=short, too_long="error"), tmp_path, tokenizer)
    with pytest.raises(SurgError, match=r"(?s)SURG059.*row 3: 1 of 3 rows have no token left"):
        load_data(plan(max_length=short, empty="error"), tmp_path, tokenizer)


def refused(folder: Path, *chats: Any, **data: Any) -> str:
    with pytest.raises(SurgError) as raised:
        read(folder, *chats, **data)
    return str(raised.value)


def test_no_template_anywhere(tmp_path: Path) -> None:
    text = refused(tmp_path, CHAT, template="tokenizer")
    assert "SURG061" in text and 'template = "chatml"' in text and "zephyr" in text


def test_a_template_that_renders_a_turn_differently_later(tmp_path: Path) -> None:
    tokenizer = byte_level(chat_template=FORGETS)
    text = refused(tmp_path, CHAT[:3], CHAT, tokenizer=tokenizer, template="tokenizer")
    assert "SURG061" in text and "row 2: the tokenizer's chat template" in text and "with message 3" in text
    assert "loss = completion" in text
    last = read(tmp_path, CHAT, tokenizer=tokenizer, template="tokenizer", loss="completion")
    assert marked(last).endswith("<|im_start|>assistant\n«<think>\n\n</think>\n\nAbout two million.<|im_end|>\n»")


def test_what_a_template_refuses_names_row_and_template(tmp_path: Path) -> None:
    wrong = [CHAT[1], CHAT[3], CHAT[4]]
    text = refused(tmp_path, CHAT, wrong, template="mistral")
    assert "row 2: the template mistral does not render it" in text and "roles must alternate" in text
    assert "begins with the assistant" in refused(tmp_path, CHAT[2:])
    nameless = byte_level(eos_token=None)
    assert "'eos_token' is undefined" in refused(tmp_path, CHAT, tokenizer=nameless, template="zephyr")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Hello", "holds a str, not a list of messages"),
        (["Hello"], "holds a list, not a list of messages"),
        ([{"from": "human", "value": "Hello"}], "message 1 of column `messages` needs a `role` and a `content`"),
        ([{"role": "user", "content": None}], "it has `role`"),
    ],
)
def test_what_is_no_conversation(messages: Any, words: str, tmp_path: Path) -> None:
    text = refused(tmp_path, CHAT, messages)
    assert "SURG051" in text and "row 2" in text and words in text and '"role": "user"' in text


def test_markers_that_are_no_tokens_are_said(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    known = tuple(marker for marker in MARKERS if marker != "<|im_end|>")
    (warning,) = load_data(plan(), tmp_path, byte_level(400, markers=known)).warnings
    assert warning.code == "SURG062" and "`<|im_end|>` (" in warning.message and "im_start" not in warning.message
    assert not load_data(plan(template="zephyr"), tmp_path, byte_level()).warnings


def test_a_date_in_a_template_does_not_change_the_rows(tmp_path: Path) -> None:
    dated = "{{- strftime_now('%d %b %Y') + '\\n' }}" + GENERATION
    found = read(tmp_path, CHAT, tokenizer=byte_level(chat_template=dated), template="tokenizer")
    assert marked(found).startswith("26 Jul 2024\n<|im_start|>")


def test_keys_without_a_value_are_no_keys(tmp_path: Path) -> None:
    shows = GENERATION + "{{- messages[0].name is defined }}"
    chat = [{**CHAT[1], "name": None}, CHAT[2]]
    found = read(tmp_path, chat, tokenizer=byte_level(chat_template=shows), template="tokenizer", loss="all")
    assert marked(found).endswith("False»")
