"""`surgery generate`: prompts and conversations, greedy and drawn, as text and as JSON, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import surgery
from surgery.runtime.data import load_data
from surgery.runtime.generate import load_speaker, prompt_tokens
from tests import command_line
from tests.project import save_project

pytestmark = pytest.mark.usefixtures("captured_once")

WORDS = ["the", "red", "blue", "bird", "fish", "sings", "swims", "and", "then", "user", "assistant", "who", "?"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
# ChatML, with a space where a tokenizer of words needs one.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}{{ raise_exception('an unknown role') }}"
    "{% endif %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
SPEC = """
model "tiny" { task = causal_lm }
adapt model.layers.*.self_attn.{q_proj,v_proj} { with lora(rank = 4, alpha = 16) }
train lm_head
step { optimizer = adamw(lr = 2e-2)  batch = 8  steps = 40  seed = 1  compile = off }
data "rows.jsonl" { text = "{text}" }
"""
SENTENCE = "the red bird sings and then the blue fish swims"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of a dozen words, and a run of it that has learnt one sentence, and one question with its answer."""
    folder = tmp_path_factory.mktemp("project")
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=SPECIAL[4:], chat_template=TEMPLATE,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    # What a model of the hub may come with, and what no greedy text may follow.
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0)
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    chat = "<|im_start|> user who sings ? <|im_end|> <|im_start|> assistant the red bird <|im_end|>"
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (f"{SENTENCE} </s>", chat) * 4)
    )
    (folder / "spec.surg").write_text(SPEC)
    command_line.succeed("train", str(folder / "spec.surg"), "-o", str(folder / "run"), "--device", "cpu")
    return folder


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """`command_line.cli`, which generates on the CPU."""
    device = ("--device", "cpu") if arguments[0] == "generate" else ()
    return command_line.cli(capsys, *arguments, *device)


def answer(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> dict[str, Any]:
    code, out, err = cli(capsys, "generate", str(folder / "run"), *arguments, "--format", "json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_prompt_is_continued_as_the_merged_model_does(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = cli(capsys, "generate", str(folder / "run"), "--prompt", "the red")
    assert (code, out, err) == (0, "bird sings and then the blue fish swims\n", "")
    found = answer(capsys, folder, "--prompt", "the red")
    assert found == {"run": str(folder / "run"), "text": out.strip(), "prompt_tokens": 2, "tokens": 9, "ended": "stop"}

    assert cli(capsys, "merge", str(folder / "run"), "-o", str(tmp_path / "merged"))[0] == 0
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("the red", return_tensors="pt").input_ids
    for _ in range(9):
        with torch.no_grad():
            ids = torch.cat([ids, merged(ids).logits[:, -1:].argmax(-1)], 1)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == f"the red {found['text']}"


def test_a_conversation_is_answered_and_ends_with_the_turn(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = json.dumps([{"role": "user", "content": "who sings ?"}])
    found = answer(capsys, folder, "--messages", text)
    assert (found["text"], found["prompt_tokens"], found["ended"]) == ("the red bird", 8, "stop")
    (tmp_path / "chat.json").write_text(text)
    assert answer(capsys, folder, "--messages", str(tmp_path / "chat.json")) == found


def test_what_is_drawn_depends_on_the_seed_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warm = ("--prompt", "the", "--temperature", "3", "--max-new-tokens", "12")
    texts = [answer(capsys, folder, *warm, "--seed", seed)["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    greedy = answer(capsys, folder, "--prompt", "the red", "--max-new-tokens", "3")
    assert (greedy["text"], greedy["ended"], greedy["tokens"]) == ("bird sings and", "length", 3)
    for narrow in (("--top-p", "0.001"), ("--temperature", "0.001"), ("--temperature", "0", "--top-p", "0.5")):
        assert answer(capsys, folder, "--prompt", "the red", "--max-new-tokens", "3", *narrow) == greedy


def test_the_last_position_ends_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "bird " * 30
    code, out, err = cli(capsys, "generate", str(folder / "run"), "--prompt", prompt, "--temperature", "50")
    assert code == 0 and len(out.split()) <= 2 and "warning[SURG070]" in err and "32 positions" in err
    code, _, err = cli(capsys, "generate", str(folder / "run"), "--prompt", "bird " * 32)
    assert code == 1 and "error[SURG070]: the prompt has 32 tokens" in err
    code, _, err = cli(capsys, "generate", str(folder / "run"), "--prompt", "")
    assert code == 1 and "the prompt has no tokens" in err


def test_a_prompt_begins_as_in_training_and_has_no_end(folder: Path) -> None:
    speaker = load_speaker(folder / "run")
    speaker.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = speaker.tokenizer.convert_ids_to_tokens(prompt_tokens(speaker, "the red"))
    assert names == ["<s>", "the", "red"]


def test_a_conversation_begins_as_a_row_of_the_runs_data(folder: Path) -> None:
    """By the template that the data names, not the tokenizer's own; up to where the learnt tokens begin."""
    chat = [
        {"role": "user", "content": "who sings ?"},
        {"role": "assistant", "content": "the red bird"},
        {"role": "user", "content": "who swims ?"},
        {"role": "assistant", "content": "the blue fish"},
    ]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    text = (
        SPEC[: SPEC.index("data")] + 'data "chat.jsonl" { messages = messages  template = "chatml"  loss = completion }'
    )
    (folder / "chat.surg").write_text(text)
    surgery.compile(surgery.parse(folder / "chat.surg")).save(folder / "chat")
    speaker = load_speaker(folder / "chat")
    rows = load_data(speaker.plan, folder, speaker.tokenizer).train.documents
    assert rows.learned is not None
    found = prompt_tokens(speaker, chat[:3])
    assert found == list(rows.tokens[0])[: len(found)] and rows.learned[0].index(1) == len(found)
    own = prompt_tokens(load_speaker(folder / "run"), chat[:3])
    assert own == found  # the same format, written by hand


def test_messages_that_are_none_or_are_not_rendered(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = cli(capsys, "generate", str(folder / "run"), "--messages", '[{"role": "judge", "content": "who"}]')
    assert code == 1 and "error[SURG061]" in err and "an unknown role" in err
    speaker = load_speaker(folder / "run")
    speaker.tokenizer.chat_template = None
    with pytest.raises(surgery.SurgError, match="SURG061.*has a chat template"):
        prompt_tokens(speaker, [{"role": "user", "content": "who"}])
    code, _, err = cli(capsys, "generate", str(folder / "run"), "--messages", "[{]")
    assert code == 2 and "no JSON" in err
    code, _, err = cli(capsys, "generate", str(folder / "run"), "--messages", "no_such.json")
    assert code == 2 and "No such file" in err
    for both in ((), ("--prompt", "a", "--messages", "[]")):
        assert cli(capsys, "generate", str(folder / "run"), *both)[0] == 2


def test_runs_that_say_nothing(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_project(tmp_path)
    spec = 'model "tiny" { task = sequence_classification(labels = 2) }\nadapt **.query { with lora(rank = 2) }\n'
    (tmp_path / "spec.surg").write_text(spec)
    surgery.compile(surgery.parse(tmp_path / "spec.surg")).save(tmp_path / "run")
    code, out, _ = cli(capsys, "generate", str(tmp_path / "run"), "--prompt", "a", "--format", "json")
    (found,) = json.loads(out)["diagnostics"]
    assert code == 1 and found["code"] == "SURG070" and found["line"] == 1
    assert "the task sequence_classification" in found["message"]

    config = (folder / "tiny" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    text = 'model config "config.json" { task = causal_lm }\nadapt **.q_proj { with lora(rank = 2) }\n'
    (tmp_path / "bare.surg").write_text(text)
    surgery.compile(surgery.parse(tmp_path / "bare.surg")).save(tmp_path / "bare")
    code, out, _ = cli(capsys, "generate", str(tmp_path / "bare"), "--prompt", "a", "--format", "json")
    (found,) = json.loads(out)["diagnostics"]
    assert code == 1 and found["code"] == "SURG030" and found["line"] == 1 and "no tokenizer" in found["message"]
