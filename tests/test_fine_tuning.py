"""`sft.surg` on the command line, from the plan to what others load; then on folders of a model and of data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.cli import main
from surgery.runtime.data import load_data
from surgery.runtime.run_folder import load_state

SPECS = Path(__file__).resolve().parent.parent / "specs"
ASKED = json.dumps([{"role": "user", "content": "What is the capital of France?"}])

# A model and its tokenizer from a folder, rows from a data set's folder with two splits.
FOLDERS = """
model "merged" { task = causal_lm  dtype = float32 }
adapt model.layers.*.{self_attn,mlp}.*_proj { with dora(rank = 4)  expect 14 }
data "chats" { messages = messages  template = chatml  max_length = 512  pack = true  split = train  eval = test }
step { optimizer = adamw(lr = 1e-3)  batch = 4  steps = 12  clip = 1.0 }
"""


def answer(capsys: pytest.CaptureFixture[str], verb: str, *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        main([verb, *arguments, "--format", "json"])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, trained once, and `merged`."""
    folder = tmp_path_factory.mktemp("sft")
    for verb in (
        ["train", str(SPECS / "sft.surg"), "-o", str(folder / "run"), "--device", "cpu"],
        ["merge", str(folder / "run"), "-o", str(folder / "merged")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(verb)
        assert not ended.value.code
    return folder


def test_the_run_learns_as_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan counts its steps, and plain transformers says of the merged model what the run says."""
    planned = answer(capsys, "plan", str(SPECS / "sft.surg"))["sample"]
    held_out = answer(capsys, "eval", str(folder / "run"), "--device", "cpu")
    rows = [json.loads(row) for row in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert planned["steps_per_epoch"] * 3 == len(rows) and planned["padding"] < 0.03
    assert planned["example"]["parts"][1]["learned"] and planned["example"]["parts"][1]["text"].endswith("<|im_end|>\n")
    assert rows[0]["loss"] > 6.8 and held_out["perplexity"] < 150  # of 1,024 tokens
    assert held_out["loss"] == rows[-1]["eval_loss"]

    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "merged")
    state = load_state(folder / "run")
    examples = load_data(state.plan, state.folder, tokenizer).held_out
    assert examples is not None
    total, count = 0.0, 0
    with torch.no_grad():
        for row in range(len(examples)):
            batch = examples.batch([row])
            labels = int(batch["labels"][:, 1:].ne(-100).sum())
            total, count = total + labels * float(model(**batch).loss), count + labels
    assert total / count == pytest.approx(held_out["loss"], rel=1e-5)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_run_answers_as_its_merged_model_and_its_adapter_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, "generate", str(folder / "run"), "--messages", ASKED, "--max-new-tokens", "40")
    assert len(found["text"].split()) > 3
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "merged")
    inputs = tokenizer.apply_chat_template(
        json.loads(ASKED), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    merged: Any = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert greedy(merged, inputs["input_ids"], tokenizer) == found["text"]
    with torch.no_grad():
        expected = merged(**inputs).logits
    answer(capsys, "export", str(folder / "run"), "--to", "peft", "-o", str(folder / "adapter"))
    base: Any = load_base(folder)
    adapted: Any = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    assert greedy(adapted, inputs["input_ids"], tokenizer) == found["text"]


def test_a_model_and_data_in_folders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `save_pretrained` and the `datasets` library wrote, named by their folders as ids of the hub are."""
    for split, name in (("train", "chat.jsonl.gz"), ("test", "chat_valid.jsonl.gz")):
        with gzip.open(SPECS / "data" / name, "rt", encoding="utf-8") as file:
            rows = [json.loads(row) for row in file][:60]
        (folder / "chats").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / "chats" / f"{split}-00000-of-00001.parquet")
    (folder / "folders.surg").write_text(FOLDERS)
    before = answer(capsys, "eval", str(folder / "run"), "--device", "cpu")["loss"]
    trained = answer(capsys, "train", str(folder / "folders.surg"), "-o", str(folder / "again"), "--device", "cpu")
    losses = [json.loads(row)["loss"] for row in (folder / "again" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == trained["steps"] == 12 and losses[0] < 5  # it goes on where the merged model stood
    assert trained["evaluation"]["loss"] == pytest.approx(before, abs=0.2)
    answer(capsys, "merge", str(folder / "again"), "-o", str(folder / "twice"))
    found = answer(capsys, "generate", str(folder / "again"), "--messages", ASKED, "--max-new-tokens", "20")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "twice")
    ids = tokenizer.apply_chat_template(json.loads(ASKED), add_generation_prompt=True, return_tensors="pt",
                                        return_dict=True)["input_ids"]  # fmt: skip
    merged = AutoModelForCausalLM.from_pretrained(folder / "twice")
    assert greedy(merged, ids, tokenizer, 20) == found["text"]


def load_base(folder: Path) -> Any:
    """The model that the run began with."""
    from surgery.runtime.models import load_model

    state = load_state(folder / "run")
    return load_model(state.plan.model, state.folder, seed=state.plan.step.seed)


def greedy(model: Any, ids: Tensor, tokenizer: Any, limit: int = 40) -> str:
    """The likeliest token each, without a cache, until the turn ends."""
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + limit and (ids.shape[1] == start or ids[0, -1] != tokenizer.eos_token_id):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    text: str = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    return text
