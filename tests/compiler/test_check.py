"""A program without a model: every setting with what it takes and refuses, rules, and what a spec may hold once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.compiler.data_settings import DATA
from surgery.compiler.settings import MODEL, TRAIN
from surgery.compiler.step_settings import STEP

RULE = "adapt **.query { with lora }\n"


def parsed(text: str, folder: Path | None = None) -> surgery.Program:
    return surgery.parse(RULE + text, folder)


def refused(text: str, folder: Path | None = None) -> list[str]:
    with pytest.raises(surgery.SurgError) as raised:
        parsed(text, folder)
    assert all(diagnostic.span is not None for diagnostic in raised.value.diagnostics)
    return [diagnostic.code for diagnostic in raised.value.diagnostics]


BLOCKS = {"model": 'model "org/name"', "step": "step", "data": 'data "rows.jsonl"', "train": "train classifier"}

# block, setting, what it becomes (field of the plan and its value)
GOOD: list[tuple[str, str, dict[str, Any]]] = [
    ("model", "task = causal_lm", {"task": "causal_lm", "labels": None}),
    ("model", "task = masked_lm", {"task": "masked_lm"}),
    ("model", "task = seq2seq_lm", {"task": "seq2seq_lm"}),
    ("model", "task = feature_extraction", {"task": "feature_extraction"}),
    ("model", "task = sequence_classification(labels = 8)", {"task": "sequence_classification", "labels": 8}),
    ("model", "task = token_classification(3)", {"task": "token_classification", "labels": 3}),
    ("model", "task = image_classification", {"task": "image_classification", "labels": None}),
    ("model", "dtype = bfloat16", {"dtype": "bfloat16"}),
    ("model", "dtype = float64", {"dtype": "float64"}),
    ("model", 'revision = "v1.0"', {"revision": "v1.0"}),
    ("model", "revision = main", {"revision": "main"}),
    ("model", "attention = eager", {"attention": "eager"}),
    ("model", 'tokenizer = "data/tokenizer"', {"tokenizer": "data/tokenizer"}),
    ("step", "optimizer = adamw(lr = 1e-3)", {"optimizer.name": "adamw", "optimizer.lr": 1e-3}),
    ("step", "optimizer = adamw(1e-3, 0.1)", {"optimizer.lr": 1e-3, "optimizer.weight_decay": 0.1}),
    (
        "step",
        "optimizer = adamw(lr = 1, betas = [0.8, 0.9], eps = 1e-6)",
        {"optimizer.betas": (0.8, 0.9), "optimizer.eps": 1e-6},
    ),
    ("step", "optimizer = sgd(lr = 0.1)", {"optimizer.name": "sgd", "optimizer.momentum": 0.0}),
    (
        "step",
        "optimizer = sgd(lr = 0.1, momentum = 0.9, nesterov = true)",
        {"optimizer.momentum": 0.9, "optimizer.nesterov": True},
    ),
    ("step", "schedule = constant", {"schedule.name": "constant"}),
    ("step", "schedule = constant(warmup = 10)", {"schedule.warmup": 10}),
    ("step", "schedule = linear(warmup = 0.1)", {"schedule.name": "linear", "schedule.warmup": 0.1}),
    ("step", "schedule = cosine(minimum = 0.1)", {"schedule.name": "cosine", "schedule.minimum": 0.1}),
    ("step", "batch = 32", {"batch": 32, "micro_batch": None}),
    ("step", "batch = 32 micro_batch = 4", {"batch": 32, "micro_batch": 4}),
    ("step", "steps = 10 ** 3", {"steps": 1000}),
    ("step", "epochs = 0.5", {"epochs": 0.5}),
    ("step", "clip = 1.0", {"clip": 1.0}),
    ("step", "precision = bfloat16", {"precision": "bfloat16"}),
    ("step", "adapter_dtype = float64", {"adapter_dtype": "float64"}),
    ("step", "seed = 123456789012", {"seed": 123456789012}),
    ("step", "compile = off", {"compile": "off"}),
    ("step", "loss = mse", {"loss": "mse"}),
    ("step", "evaluate = every(100)", {"evaluate": 100}),
    ("step", "save = every(200, keep = 2)", {"save": 200, "keep": 2}),
    ("step", "save = 50", {"save": 50, "keep": None}),
    ("step", "log = every(1)", {"log": 1}),
    ("step", "evaluate = every(5) best = f1", {"best": "f1", "stop": None}),
    ("step", "evaluate = every(5) stop = patience(3)", {"best": "loss", "stop": 3}),
    ("step", "evaluate = 5 stop = patience(evaluations = 3) best = pearson", {"best": "pearson", "stop": 3}),
    ("step", "report = tensorboard", {"report.name": "tensorboard", "report.project": None}),
    ("step", 'report = wandb(project = "chats")', {"report.name": "wandb", "report.project": "chats"}),
    ("step", 'report = trackio("chats")', {"report.name": "trackio", "report.project": "chats"}),
    ("data", 'text = "{a} {b}"', {"text": "{a} {b}", "label": None, "max_length": 512, "loss": "all"}),
    ("data", "text = question", {"text": "{question}"}),
    ("data", "text = a loss = all", {"loss": "all"}),
    ("data", 'text = "{a}" label = kind', {"label": "kind"}),
    ("data", 'text = "{a}" label = "a kind"', {"label": "a kind"}),
    ("data", 'text = "{a}" max_length = 64', {"max_length": 64}),
    ("data", 'text = "{a}" holdout = 0.2', {"holdout": 0.2}),
    ("data", 'text = "{a}" calibrate = 64', {"calibrate": 64}),
    ("data", 'text = "{a}" eval = "other.jsonl"', {"eval": "other.jsonl", "eval_split": None}),
    ("data", "text = a split = train_sft subset = main", {"split": "train_sft", "subset": "main"}),
    ("data", "text = a split = train eval = test", {"eval": None, "eval_split": "test"}),
    ("data", 'prompt = "Q: {a}" completion = b', {"prompt": "Q: {a}", "completion": "{b}", "loss": "completion"}),
    ("data", "prompt = a completion = b loss = all", {"loss": "all"}),
    ("data", "messages = chat", {"messages": "chat", "template": "tokenizer", "loss": "assistant"}),
    ("data", 'messages = chat template = "llama-3"', {"template": "llama-3"}),
    ("data", "messages = chat template = chatml loss = completion", {"template": "chatml", "loss": "completion"}),
    ("data", "text = a too_long = drop", {"too_long": "drop", "empty": "drop"}),
    ("data", "text = a too_long = error empty = error", {"too_long": "error", "empty": "error"}),
    ("data", "text = a pack = true", {"pack": True}),
    ("train", "lr = 5e-3", {"lr": 5e-3, "weight_decay": None}),
    ("train", "weight_decay = 0", {"weight_decay": 0}),
]


@pytest.mark.parametrize(
    ("block", "setting", "values"), GOOD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_settings(block: str, setting: str, values: dict[str, Any]) -> None:
    program = parsed(f"{BLOCKS[block]} {{ {setting} }}")
    record = {"model": program.model, "step": program.step, "data": program.data, "train": (*program.trained, None)[0]}
    for path, expected in values.items():
        value: Any = record[block]
        for name in path.split("."):
            value = getattr(value, name)
        assert value == expected


BAD: list[tuple[str, str, str]] = [
    ("model", "task = causal", "SURG002"),
    ("model", "task = causal_lm(labels = 2)", "SURG002"),
    ("model", "task = sequence_classification(labels = 0)", "SURG004"),
    ("model", "task = sequence_classification(labels = 1.5)", "SURG004"),
    ("model", "task = 3", "SURG004"),
    ("model", "dtype = float8", "SURG002"),
    ("model", "dtype = 32", "SURG004"),
    ("model", "attention = flash", "SURG002"),
    ("model", "revision = 4", "SURG004"),
    ("model", "quantize = fp4", "SURG002"),
    ("model", "quantize = 4", "SURG004"),
    ("model", "tasks = causal_lm", "SURG002"),
    ("step", "optimizer = adam(lr = 1)", "SURG002"),
    ("step", "optimizer = adamw", "SURG004"),
    ("step", "optimizer = adamw(lr = 0)", "SURG004"),
    ("step", "optimizer = adamw(lr = -1)", "SURG004"),
    ("step", 'optimizer = adamw(lr = "x")', "SURG004"),
    ("step", "optimizer = adamw(lr = rate)", "SURG002"),
    ("step", "optimizer = adamw(lr = 1, lr = 2)", "SURG009"),
    ("step", "optimizer = adamw(lr = 1, momentum = 0.9)", "SURG002"),
    ("step", "optimizer = adamw(lr = 1, betas = 0.9)", "SURG004"),
    ("step", "optimizer = adamw(lr = 1, betas = [0.9, 1])", "SURG004"),
    ("step", "optimizer = sgd(lr = 1, nesterov = true)", "SURG004"),
    ("step", "optimizer = sgd(lr = 1, momentum = 1)", "SURG004"),
    ("step", "optimizer = sgd(lr = 1, nesterov = 1, momentum = 0.9)", "SURG004"),
    ("step", "schedule = step_down", "SURG002"),
    ("step", "schedule = linear(minimum = 1)", "SURG004"),
    ("step", "schedule = constant(minimum = 0.1)", "SURG002"),
    ("step", 'schedule = "linear"', "SURG004"),
    ("step", "batch = 0", "SURG004"),
    ("step", "batch = 1.5", "SURG004"),
    ("step", "batch = 10 ** 18", "SURG004"),
    ("step", "batch = 4 micro_batch = 8", "SURG004"),
    ("step", "micro_batch = 99", "SURG004"),  # more than the default batch
    ("step", "steps = 10 epochs = 1", "SURG004"),
    ("step", "steps = 10 steps = 11", "SURG009"),
    ("step", "steps = -1", "SURG004"),
    ("step", "epochs = 0", "SURG004"),
    ("step", "clip = 0", "SURG004"),
    ("step", "seed = -1", "SURG004"),
    ("step", "precision = half", "SURG002"),
    ("step", "adapter_dtype = int8", "SURG002"),
    ("step", "compile = true", "SURG004"),
    ("step", "loss = l2", "SURG002"),
    ("step", "save = every()", "SURG004"),
    ("step", "save = each(2)", "SURG002"),
    ("step", "evaluate = every(100, keep = 2)", "SURG002"),
    ("step", "log = every(0)", "SURG004"),
    ("step", "recompute = layers", "SURG002"),
    ("step", "recompute = budget", "SURG004"),
    ("step", "recompute = budget(1.5)", "SURG004"),
    ("step", "recompute = budget(-1)", "SURG004"),
    ("step", "recompute = budget(rows = 1)", "SURG002"),
    ("step", "recompute = blocks(2)", "SURG002"),
    ("step", "recompute = true", "SURG004"),
    ("step", "report = mlflow", "SURG002"),
    ("step", 'report = tensorboard(project = "chats")', "SURG002"),
    ("step", "report = wandb(project = 3)", "SURG004"),
    ("step", "evaluate = 5 best = bleu", "SURG002"),
    ("step", "best = loss", "SURG004"),
    ("step", "stop = patience(3)", "SURG004"),
    ("step", "evaluate = 5 stop = 3", "SURG002"),
    ("step", "evaluate = 5 stop = patience(0)", "SURG004"),
    ("step", "learning_rate = 1", "SURG002"),
    ("step", "train classifier { lr = 0 }", "SURG004"),
    ("step", "train classifier { rate = 1 }", "SURG002"),
    ("step", "freeze a**", "SURG004"),
    ("data", "label = kind", "SURG004"),
    ("data", "text = 3", "SURG004"),
    ("data", 'text = "column"', "SURG004"),
    ("data", 'text = "{{column}}"', "SURG004"),
    ("data", "text = a messages = b", "SURG004"),
    ("data", "prompt = a", "SURG004"),
    ("data", "completion = a", "SURG004"),
    ("data", 'prompt = "Question:" completion = b', "SURG004"),
    ("data", "prompt = a completion = b label = c", "SURG004"),
    ("data", "text = a template = chatml", "SURG004"),
    ("data", "text = a loss = assistant", "SURG004"),
    ("data", "prompt = a completion = b loss = assistant", "SURG004"),
    ("data", "messages = chat loss = last", "SURG002"),
    ("data", 'messages = chat template = "llama-2"', "SURG002"),
    ("data", "messages = chat too_long = cut", "SURG002"),
    ("data", "messages = chat empty = truncate", "SURG002"),
    ("data", "messages = chat pack = 2", "SURG004"),
    ("data", 'text = "{a}" holdout = 0.1 eval = test', "SURG004"),
    ("data", 'text = "{a}" holdout = 1', "SURG004"),
    ("data", 'text = "{a}" holdout = 0.1 eval = "b"', "SURG004"),
    ("data", 'text = "{a}" max_length = 0', "SURG004"),
    ("data", 'text = "{a}" texts = 1', "SURG002"),
    ("train", "lr = 0", "SURG004"),
    ("train", "rate = 1", "SURG002"),
    ("train", "weight_decay = -1", "SURG004"),
]


@pytest.mark.parametrize(("block", "setting", "code"), BAD)
def test_settings_are_refused(block: str, setting: str, code: str) -> None:
    assert refused(f"{BLOCKS[block]} {{ {setting} }}") == [code]


@pytest.mark.parametrize(("block", "readers"), [("model", MODEL), ("step", STEP), ("data", DATA), ("train", TRAIN)])
def test_every_setting_is_tried(block: str, readers: dict[str, Any]) -> None:
    lines = " ".join(setting for where, setting, *_ in (*GOOD, *BAD) if where == block)
    later = {name for name in readers if refuses_all(block, name)}
    assert {name for name in readers if f"{name} =" not in lines} <= later


def refuses_all(block: str, name: str) -> bool:
    """Whether the setting is accepted syntax that is not built yet."""
    try:
        parsed(f"{BLOCKS[block]} {{ {name} = something }}")
    except surgery.SurgError as error:
        return any(found.code == "SURG008" for found in error.diagnostics)
    return False


def test_all_is_collected() -> None:
    blocks = 'model "x" { tasks = 1  dtype = 3 }\nstep { batch = 0  lr = 1 }\n'
    text = f"{blocks}adapt **.key {{ with lara }}\nadapt a** {{ with lora }}"
    assert sorted(refused(text)) == ["SURG002", "SURG002", "SURG002", "SURG004", "SURG004", "SURG004"]


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ('model "a" {}\nmodel "b" {}', ["SURG009"]),
        ('data "a" { text = x }\ndata "b" { text = x }', ["SURG009"]),
        ('model "m" { task = causal_lm } data "a" { text = x  label = y }', ["SURG031"]),
        ('model "m" { task = sequence_classification(2) } data "a" { text = x }', ["SURG031"]),
        ('model "m" { task = sequence_classification(2) } data "a" { messages = x }', ["SURG031"]),
        ('model "m" { task = sequence_classification(2) } data "a" { text = x  label = y  pack = true }', ["SURG031"]),
        ("step { steps = 2  epochs = 1 }\nstep { epochs = 2 }\nstep { steps = 2  epochs = 1 }", ["SURG004"] * 2),
        ("step { seed = 2 }\nstep { seed = 2  loss = mse  batch = 3 }", ["SURG004"] * 2),
        ("step { clip = 1.0 }\nstep { optimizer = loko() }", ["SURG004"]),
        ("method m() { delta = W }\nmethod m() { delta = W }", ["SURG009"]),
        ("adapt a { with lora  with dora }", ["SURG009"]),
        ("adapt a { with lora  expect 1  expect 2 }", ["SURG009"]),
        ("adapt a { expect 1 }", ["SURG004"]),
        ("adapt a { with lara }", ["SURG002"]),
        ("adapt a { with 3 }", ["SURG004"]),
        ("adapt a { with lora + dora }", ["SURG035"]),
        ("adapt a { with 2 * lora(rank = 0) }", ["SURG026"]),
        ("adapt a { with lora  strategy = fast }", ["SURG002"]),
        ("adapt a { with lora  update = literal }", ["SURG032"]),
        ("adapt a { with lora  active = random(2) }", ["SURG004"]),
        ("adapt a { with lora  active = 2 }", ["SURG002"]),
        ("adapt a { with lora  active = random(0, every = 3) }", ["SURG004"]),
        ("adapt a { with lora  ranks = 3 }", ["SURG002"]),
        ("adapt a { with lora(rank = 0) }", ["SURG026"]),
        ('use "nowhere.surg"', ["SURG011"]),
    ],
)
def test_rules(text: str, codes: list[str]) -> None:
    assert refused(text) == codes


def test_a_method_of_the_spec_goes_before_the_library_s() -> None:
    own = "method lora(rank: int = 3) { A = train zeros[out, in]\ndelta = A }\n"
    assert parsed(own).rules[0].arguments == {"rank": 3}


def test_methods_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "methods.surg").write_text("method own() { A = train zeros[out, in]\ndelta = A }")
    program = parsed('use "methods.surg"\nadapt a { with own }', tmp_path)
    assert program.rules[1].method.name == "own"
    (tmp_path / "methods.surg").write_text("method own() { delta = V }")
    assert refused('use "methods.surg"\nadapt a { with own }', tmp_path) == ["SURG002"]
    (tmp_path / "methods.surg").write_text("step { batch = 2 }")
    assert refused('use "methods.surg"', tmp_path) == ["SURG004"]
    (tmp_path / "methods.surg").write_bytes(b"method own() { delta = W } # \xff")
    assert refused('use "methods.surg"', tmp_path) == ["SURG011"]
    assert refused('use "."', tmp_path) == ["SURG011"]


def test_a_misspelt_name_gets_the_nearest() -> None:
    with pytest.raises(surgery.SurgError, match="did you mean `batch`"):
        parsed("step { bach = 2 }")
    with pytest.raises(surgery.SurgError, match="did you mean `lora`"):
        parsed("adapt a { with loraa }")
    with pytest.raises(surgery.SurgError, match="did you mean `alpha`"):
        parsed("adapt a { with lora(alpa = 2) }")


def test_an_evaluation_of_no_rows_is_said() -> None:
    rules = 'model "a/b" {{ task = causal_lm }} adapt ** {{ with lora() }}'
    spec = rules + ' step {{ evaluate = 2 }} data "r.jsonl" {{ {} }}'
    (found,) = surgery.parse(spec.format("text = a")).warnings
    assert found.code == "SURG004" and found.span is not None and found.span.text == "evaluate = 2"
    assert not surgery.parse(spec.format("text = a  holdout = 0.1")).warnings
