"""The diagnostics that need a model, data or a run folder, as people see them; `test_errors.py` has those of a spec."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import surgery
from surgery.compiler import p5_capture
from surgery.compiler.diagnostics import Diagnostic, render
from surgery.compiler.plan import Place
from surgery.peft.importing import import_adapter
from surgery.peft.write import export
from surgery.runtime.data import Data, Examples, load_data
from surgery.runtime.data.files import DataFile
from surgery.runtime.generate import load_speaker
from surgery.runtime.run_folder import load_state
from surgery.runtime.trackers import open_report
from surgery.runtime.train import train
from tests.tokenizer import byte_level, joining

Golden = Callable[[str, str], None]
RULE = "adapt ** : Linear { with lora(rank = 2) }\n"
STEP = "step { optimizer = adamw(lr = 1e-2)  batch = 2  steps = 3  loss = cross_entropy }\n"


CHAT = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}]


class Plain(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.relu(self.first(x)))
        return found


class Branching(Plain):
    """Takes a way that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > 0 else x


class Letters:
    """A tokenizer of letters."""

    pad_token_id = 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1, *map(ord, text)] for text in texts]}


def llama() -> Any:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         vocab_size=32, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config)


def compiled(model: nn.Module | None = None, text: str = RULE + STEP, **inputs: Tensor) -> Any:
    return surgery.compile(surgery.parse(text), model or Plain(), inputs or {"x": torch.randn(3, 4)})


def data(folder: Path, rows: str, column: str = "text") -> Any:
    """What reading the rows gives; the plan is one for a classification of two labels."""
    (folder / "rows.jsonl").write_text(rows)
    spec = folder / "spec.surg"
    spec.write_text(
        'model config "tiny.json" { task = sequence_classification(labels = 2) }\ntrain classifier\n'
        f'data "rows.jsonl" {{ text = "{{{column}}}"  label = label }}\n'
    )
    config = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1,
              "intermediate_size": 8, "vocab_size": 300}  # fmt: skip
    (folder / "tiny.json").write_text(json.dumps(config))
    return load_data(surgery.plan(surgery.parse(spec)), folder, Letters())


def missing_file(folder: Path) -> None:
    surgery.parse('use "methods.surg"\n' + RULE, folder)


def uncapturable(folder: Path) -> None:
    compiled(Branching())


def no_inputs(folder: Path) -> None:
    surgery.compile(surgery.parse(RULE), Plain())


def left_padded(folder: Path) -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    step = compiled(llama(), "adapt **.q_proj { with lora(rank = 2) }\n", input_ids=ids)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    step({"input_ids": ids, "labels": ids, "attention_mask": mask})


def no_labels(folder: Path) -> None:
    compiled()({"x": torch.randn(2, 4)})


def broken_row(folder: Path) -> None:
    data(folder, '{"text": "a", "label": "x"}\n{"text": "b", "label":\n')


def wrong_column(folder: Path) -> None:
    data(folder, '{"text": "a", "label": "x"}\n', "txt")


def no_rows(folder: Path) -> None:
    data(folder, "")


def chats(folder: Path, *rows: Any, template: str = "chatml", more: str = "", tokenizer: Any = None) -> Any:
    """What reading conversations gives."""
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    spec = folder / "spec.surg"
    spec.write_text(
        'model config "tiny.json" { task = causal_lm }\ntrain lm_head\n'
        f'data "chat.jsonl" {{\n    messages = messages  template = {template}{more}\n}}\n'
    )
    (folder / "tiny.json").write_text(llama().config.to_json_string())
    return load_data(surgery.plan(surgery.parse(spec)), folder, tokenizer or byte_level())


def too_long(folder: Path) -> None:
    chats(folder, CHAT, [*CHAT, *CHAT], more="  max_length = 30  too_long = error")


def wrong_roles(folder: Path) -> None:
    chats(folder, CHAT, [*CHAT[:1], *CHAT], template="mistral")


def no_package(folder: Path) -> None:
    (folder / "spec.surg").write_text('data "rows.parquet" { text = text }\n')
    place = Place(file="spec.surg", line=1, column=1, start=0, end=35)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pyarrow", *(name for name in sys.modules if name.startswith("pyarrow."))):
            patch.setitem(sys.modules, name, None)
        list(DataFile("rows.parquet", folder, place).rows())


def diverged(folder: Path) -> None:
    step = compiled(text=RULE + STEP.replace("1e-2", "1e30"))
    tokens = tuple([number] for number in range(6))
    found = Data(train=NoTokens(tokens, tuple(number % 2 for number in range(6)), 0), held_out=None)
    train(step, found, folder / "run", progress=False)


class NoTokens(Examples):
    """Rows of features, for a model that reads no tokens."""

    def batch(self, rows: Any) -> dict[str, Tensor]:
        assert self.labels is not None
        return {"x": torch.ones(len(rows), 4), "labels": torch.tensor([self.labels[row] for row in rows])}


def no_run(folder: Path) -> None:
    load_state(folder)


def always_tied(folder: Path) -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    config.decoder_start_token_id = 0
    ids = torch.ones(2, 5, dtype=torch.long)
    text = 'model "unused" { task = seq2seq_lm }\nadapt lm_head { with lora(rank = 2)  untie }\n'
    model = T5ForConditionalGeneration(config)
    inputs = {"input_ids": ids, "attention_mask": ids, "decoder_input_ids": ids}
    compiled(model, text, **inputs).merge()


def no_text(folder: Path) -> None:
    compiled().save(folder / "run")
    load_speaker(folder / "run")


def no_tracker(folder: Path) -> None:
    (folder / "run").write_text("a file where the run folder is to be")
    plan = compiled(text=RULE + STEP.replace("steps = 3", "steps = 3  report = tensorboard")).plan
    open_report(plan, folder, folder / "run", "identity", done=0)


def no_blocks(folder: Path) -> None:
    text = RULE + "step { recompute = blocks  loss = cross_entropy }\n"
    surgery.plan(surgery.parse(text), model=Plain())


def no_counterpart(folder: Path) -> None:
    config = {"peft_type": "LORA", "lora_bias": True, "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "layer_replication": [[0, 2]]}
    llama().save_pretrained(folder / "tiny")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    import_adapter(folder, folder, model=str(folder / "tiny"))


def no_lora(folder: Path) -> None:
    step = compiled(text=RULE.replace("lora(rank = 2)", "mask(W) * lora(rank = 2)") + STEP)
    export(step, folder, folder / "adapter")


RAISED = {
    "SURG038": no_blocks, "SURG011": missing_file, "SURG040": uncapturable, "SURG042": no_inputs,
    "SURG043": left_padded, "SURG044": no_labels, "SURG050": broken_row, "SURG051": wrong_column,
    "SURG052": no_rows, "SURG053": diverged, "SURG054": no_run, "SURG055": always_tied,
    "SURG064": no_lora, "SURG070": no_text, "SURG071": no_tracker,
    "SURG065": no_counterpart, "SURG059": too_long, "SURG061": wrong_roles, "SURG063": no_package,
}  # fmt: skip


def text_of(diagnostics: tuple[Diagnostic, ...], folder: Path) -> str:
    return "\n\n".join(map(render, diagnostics)).replace(f"{folder}/", "").replace(str(folder), "run") + "\n"


@pytest.mark.parametrize("code", list(RAISED))
def test_an_error_in_a_run(code: str, tmp_path: Path, golden: Golden) -> None:
    torch.manual_seed(0)
    with pytest.raises(surgery.SurgError) as raised:
        RAISED[code](tmp_path)
    assert {found.code for found in raised.value.diagnostics} == {code}
    assert all(found.help or found.notes for found in raised.value.diagnostics)
    if code != "SURG040" or torch.__version__.startswith("2.13"):  # its note quotes torch
        golden(text_of(raised.value.diagnostics, tmp_path), f"errors/run/{code}.txt")


def test_dropped_checkpointing_is_said(tmp_path: Path, golden: Golden) -> None:
    model = llama()
    model.gradient_checkpointing_enable()
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.warns(UserWarning, match="SURG056"):
        compiled(model, "adapt **.q_proj { with lora(rank = 2) }\n", input_ids=ids)
    golden(text_of(p5_capture.run(model, {"input_ids": ids}, "causal_lm").warnings, tmp_path), "errors/run/SURG056.txt")


def test_what_peft_does_otherwise_is_said(tmp_path: Path, golden: Golden) -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         vocab_size=32, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).bfloat16()
    text = 'model "unused" { task = causal_lm }\nadapt lm_head { with pissa(rank = 2)  untie }\n'
    found = export(compiled(model, text, input_ids=torch.ones(2, 5, dtype=torch.long)), tmp_path, tmp_path / "adapter")
    assert [warning.code for warning in found.warnings] == ["SURG066", "SURG067"]
    golden(re.sub(r"\d\.\de-\d+", "N", text_of(found.warnings, tmp_path)), "errors/run/SURG066.txt")


def test_markers_that_are_no_tokens_are_said(tmp_path: Path, golden: Golden) -> None:
    found = chats(tmp_path, CHAT, tokenizer=joining())
    golden(text_of(found.warnings, tmp_path), "errors/run/SURG062.txt")


def test_rows_left_out_are_said(tmp_path: Path, golden: Golden) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "", "label": "y"}, {"text": "c", "label": "y"}]
    found = data(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    golden(text_of(found.warnings, tmp_path), "errors/run/SURG057.txt")
