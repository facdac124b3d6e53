"""Runs as adapters of peft: kinds of weights, what moved W, whole modules, and what is refused.

The methods of the library are exported in test_behaviour.py.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import surgery
from surgery.compiler.algebra.change import NotNarrow
from surgery.peft.write import export
from surgery.runtime.export import _small_factors
from tests.command_line import cli, succeed
from tests.off_start import off_start
from tests.project import save_project

pytestmark = pytest.mark.usefixtures("captured_once")

OWN = """
method scaled() {
    A = train kaiming_uniform[2, in];  B = train zeros[out, 2];  s = train ones[out]
    weight = s[:, None] * (W + B @ A)
}
method moving(share: real = 0.5) {  # by no closed form
    A = train kaiming_uniform[2, in];  B = train zeros[out, 2]
    delta = B @ A
    after step when step < 1 { W += share * abs(B) @ A }
}
method growing() {  # by a matrix of full rank
    A = train kaiming_uniform[2, in];  B = train zeros[out, 2]
    delta = B @ A
    after step { W += 0.1 * abs(B @ A) }
}
method rows() { A = train kaiming_uniform[2, in];  B = train zeros[out, 2];  output = y + x @ A.T @ B.T }
"""
LORA = "{ with lora(rank = 2) }"
LITERAL = "delta_lora(rank = 2, start = 0)  update = literal"
QUERIES, DOWN = "adapt **.query", "adapt model.layers.*.mlp.down_proj"
EXPERTS = "adapt model.layers.*.mlp.experts.{gate_up_proj,down_proj}"
PATCHES = "adapt vit.embeddings.patch_embeddings.projection"
Q = "adapt model.layers.*.self_attn.q_proj"


def compiled(architectures: Any, name: str, rules: str, dtype: torch.dtype = torch.float64, steps: int = 2) -> Any:
    """A step after some batches, its tensors off their start, and inputs for it."""
    architecture = architectures[name]
    labels = f"{architecture.task}(labels = 3)" if "classification" in architecture.task else architecture.task
    settings = "optimizer = sgd(lr = 0.05)  batch = 4  steps = 9  compile = off"
    text = f'model "given" {{ task = {labels} }}\n{OWN}{rules}\nstep {{ {settings} }}'
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in architecture.inputs(4, 9).items()
    }
    step = surgery.compile(surgery.parse(text), model=architecture.model().to(dtype), example_inputs=inputs)
    off_start(step, 0.1, seed=9)
    for _ in range(steps):
        step({**inputs, "labels": architecture.labels()})
    return step, inputs


def exported(step: Any, folder: Path, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The config of the run in `folder`/adapter."""
    config: dict[str, Any] = export(step, folder, folder / "adapter", dtype).config
    return config


def check(step: Any, inputs: dict[str, Tensor], folder: Path, merges: bool = True, tolerance: float = 1e-10) -> None:
    """peft's logits are the step's, and not the model's; merged ones too."""
    base = copy.deepcopy(step.model).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="(?s).*(is_gradient_checkpointing|tie_word_embeddings)")
        expected, before = step.forward(**inputs).logits, base(**inputs).logits
        adapted: Any = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
        torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=tolerance, atol=tolerance)
        assert float((expected - before).abs().max()) > 1e-4
        if merges:
            merged = adapted.merge_and_unload()(**inputs).logits
            torch.testing.assert_close(merged, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def experts_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's grouped product takes no float64; that of transformers does."""
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *given: False)


@pytest.mark.parametrize(
    ("name", "rules", "rank", "dora"),
    [
        ("gpt2", "adapt transformer.h.*.attn.c_attn { with dora(rank = 3) }", 3, True),
        ("gpt2", f"adapt transformer.wpe {LORA}", 2, False),
        ("bert", f"adapt bert.embeddings.word_embeddings {{ with {LITERAL} }}", 4, False),
        ("vit", f"{PATCHES} {LORA}", 2, False),
        ("vit", f"{PATCHES} {{ with dora(rank = 3) }}", 3, True),
        ("vit", f"{PATCHES} {{ with {LITERAL} }} adapt **.q_proj {LORA}", 4, False),
        ("qwen3_moe", f"adapt model.layers.*.mlp.gate {LORA}", 2, False),
        ("qwen3_moe", f"{EXPERTS} {{ with lora(rank = 3) }} {Q} {{ with lora(dropout = 0.1) }}", 8, False),
        ("qwen3_moe", f"{EXPERTS} {{ with {LITERAL} }}", 4, False),
        ("llama", f"{Q} {{ with lora(rank = 2) + 0.5 * vera(rank = 3) }} {DOWN} {LORA}", 5, False),
        ("llama", f"{Q} {{ with scaled() }} {DOWN} {LORA}", 2, True),
        ("llama", f"{Q} {{ with ia3() }} {DOWN} {LORA}", 2, True),  # the rows of W scaled, and no factors
        ("llama", f"{Q} {{ with rows() }}", 2, False),
    ],
)
def test_weights_of_every_kind(
    name: str, rules: str, rank: int, dora: bool, architectures: Any, tmp_path: Path
) -> None:
    step, inputs = compiled(architectures, name, rules)
    config = exported(step, tmp_path)
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (rank, rank, dora)
    check(step, inputs, tmp_path)


@pytest.mark.parametrize(("update", "rank"), [("literal", 4), ("telescope", 4)])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_delta_lora_has_twice_the_rank_once_it_has_begun(
    start: int, update: str, rank: int, architectures: Any, tmp_path: Path
) -> None:
    rules = f"{Q} {{ with delta_lora(rank = 2, start = {start})  update = {update} }}"
    step, inputs = compiled(architectures, "llama", rules, steps=4)
    begun = start < 3 or update == "telescope"
    assert exported(step, tmp_path)["r"] == (rank if begun else 2)
    check(step, inputs, tmp_path)


def test_w_that_moved_by_no_closed_form_is_factored_by_its_numbers(architectures: Any, tmp_path: Path) -> None:
    step, inputs = compiled(architectures, "llama", f"{Q} {{ with moving() }}")
    assert exported(step, tmp_path)["r"] > 2
    check(step, inputs, tmp_path)
    step, inputs = compiled(architectures, "llama", f"{Q} {{ with growing() }}")
    with pytest.raises(surgery.SurgError, match="what they added has no small factors"):
        exported(step, tmp_path)


def test_factors_of_large_matrices_are_found_in_part_of_the_space() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((300, 20), (20, 400)))
    noise = 1e-9 * torch.randn(300, 400, generator=generator, dtype=torch.float64)
    found = _small_factors(torch.stack([left @ right + noise, left[:, :3] @ right[:3]]), 5e-9, 4)
    assert found[0].shape == (2, 300, 20) and not found[0][1, :, 3:].any()
    torch.testing.assert_close(found[0][0] @ found[1][0], left @ right, rtol=0, atol=1e-8)
    torch.testing.assert_close(found[0][1] @ found[1][1], left[:, :3] @ right[:3], rtol=0, atol=1e-8)
    with pytest.raises(NotNarrow):
        _small_factors(noise, 1e-12, 4)


def test_corrections_of_w_count_from_the_models_own(architectures: Any, tmp_path: Path) -> None:
    step, inputs = compiled(architectures, "llama", f"{Q} {{ with pissa(rank = 2) }} {DOWN} {LORA}")
    assert exported(step, tmp_path)["r"] == 4
    check(step, inputs, tmp_path)
    assert not torch.equal(step.weights["model.layers.0.self_attn.q_proj.weight"],
                           step.model.get_parameter("model.layers.0.self_attn.q_proj.weight"))  # fmt: skip


@pytest.mark.parametrize("method", ["pissa(rank = 2)", LITERAL])
def test_rounding_of_moved_weights_is_said(method: str, architectures: Any, tmp_path: Path) -> None:
    step, inputs = compiled(architectures, "llama", f"{Q} {{ with {method} }}", torch.bfloat16, steps=5)
    made = export(step, tmp_path, tmp_path / "adapter")
    assert made.config["r"] == 4
    (warning,) = made.warnings
    assert warning.code == "SURG066" and warning.severity == "warning" and "2 sites" in warning.message
    with torch.no_grad():
        adapted: Any = peft.PeftModel.from_pretrained(copy.deepcopy(step.model), tmp_path / "adapter").eval()
        torch.testing.assert_close(adapted(**inputs).logits, step.forward(**inputs).logits, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("qwen2", f"adapt lm_head {{ with {LITERAL}  tie }}"),
        ("gpt2", "adapt transformer.wte { with lora(rank = 3)  tie }"),
        ("qwen2", f"adapt lm_head {{ with {LITERAL}  untie }}"),
    ],
)
def test_tied_weights(name: str, rules: str, architectures: Any, tmp_path: Path) -> None:
    step, inputs = compiled(architectures, name, rules)
    made = export(step, tmp_path, tmp_path / "adapter", torch.float64)
    assert [warning.code for warning in made.warnings] == ["SURG067"]
    assert len(made.config["target_modules"]) == (1 if "untie" in rules else 2)
    check(step, inputs, tmp_path, merges=False)


@pytest.mark.parametrize(
    ("rules", "modules", "task", "bias"),
    [
        (f"{QUERIES} {LORA}  train classifier", ["classifier"], "SEQ_CLS", "none"),
        (f"{QUERIES} {LORA}", None, "SEQ_CLS", "none"),
        (f"adapt classifier {LORA}", None, None, "none"),  # peft would keep it whole for this task
        (f"{QUERIES} {LORA}  train **.query.bias", None, "SEQ_CLS", "all"),
        (f"{QUERIES} {LORA}  train bert.pooler", ["bert.pooler.dense"], "SEQ_CLS", "none"),
        (f"{QUERIES} {LORA}  train bert.encoder.layer.1.output.LayerNorm.bias",
         ["bert.encoder.layer.1.output.LayerNorm"], "SEQ_CLS", "none"),
    ],
)  # fmt: skip
def test_what_is_trained_whole(
    rules: str, modules: list[str] | None, task: str | None, bias: str, architectures: Any, tmp_path: Path
) -> None:
    step, inputs = compiled(architectures, "bert", rules)
    config = exported(step, tmp_path)
    assert (config["modules_to_save"], config["task_type"], config["bias"]) == (modules, task, bias)
    assert ("auto_mapping" in config and config["auto_mapping"] is None) == (task is not None)
    check(step, inputs, tmp_path)


def test_trained_embeddings_are_kept_under_both_names_of_a_tie(architectures: Any, tmp_path: Path) -> None:
    step, inputs = compiled(architectures, "qwen2", f"{Q} {LORA}  train model.embed_tokens")
    assert set(exported(step, tmp_path)["modules_to_save"]) == {"lm_head", "model.embed_tokens"}
    check(step, inputs, tmp_path, merges=False)


class Named(nn.Module):
    """Modules whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.pre_last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"last": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.tanh(self.pre_last(self.inner["last"](x))))
        return found


def named(rules: str) -> Any:
    torch.manual_seed(0)
    text = f"{rules} step {{ optimizer = sgd(lr = 0.1)  loss = cross_entropy  steps = 4 }}"
    batch = {"x": torch.randn(4, 6)}
    step = surgery.compile(surgery.parse(text), model=Named(), example_inputs=batch)
    for _ in range(3):
        step({**batch, "labels": torch.arange(4)})
    return step, batch


def test_names_that_end_alike(tmp_path: Path) -> None:
    step, batch = named(f"adapt last {LORA}")
    assert exported(step, tmp_path, torch.float32)["target_modules"] == "last"  # an expression: "inner.last" is none
    adapted: Any = peft.PeftModel.from_pretrained(copy.deepcopy(step.model), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch), step.forward(**batch))
    step, batch = named(f"adapt inner.last {LORA}  train last")  # peft keeps all modules whose names end in `last`
    with pytest.raises(surgery.SurgError, match="`inner.last` is kept whole, and `inner.last` is adapted"):
        exported(step, tmp_path)


@pytest.mark.parametrize(
    ("name", "rules", "words"),
    [
        ("llama", f"{Q} {{ with oft(block = 4) }}", "what it multiplies with is not W and a change of W"),
        ("llama", f"{Q} {{ with mask(W) * lora(rank = 2) }}", "its change of W may have full rank"),
        ("llama", f"{Q} {{ with adapter(bottleneck = 2) }}", "`surgery.apply(RUN, model)`"),
        ("bert", f"{QUERIES} {{ with bitfit() }}", "it changes the bias"),
        ("bert", "adapt bert.embeddings.word_embeddings { with dora(rank = 2) }", "linears and convolutions alone"),
        ("bert", "adapt bert.encoder.layer.*.output.LayerNorm { with ln_tuning() }", "peft adapts no norms"),
        ("qwen2", "adapt lm_head { with dora(rank = 2)  tie }", "tied to that of `model.embed_tokens`"),
        ("qwen3_moe", f"{EXPERTS} {{ with dora(rank = 2) }}", "linears and convolutions alone"),
        ("vit", f"{PATCHES} {LORA}  train vit.embeddings.cls_token", "`vit.embeddings` is kept whole, and"),
    ],
)
def test_what_peft_has_no_place_for(name: str, rules: str, words: str, architectures: Any, tmp_path: Path) -> None:
    step, _ = compiled(architectures, name, rules)
    with pytest.raises(surgery.SurgError) as raised:
        exported(step, tmp_path)
    assert {found.code for found in raised.value.diagnostics} == {"SURG064"}
    assert words in str(raised.value) and ("surgery merge RUN" in str(raised.value) or "apply" in words)
    assert not (tmp_path / "adapter").exists()


def test_all_that_is_refused_is_said_at_once(architectures: Any, tmp_path: Path) -> None:
    rules = f"{Q} {{ with oft(block = 4) }} {DOWN} {{ with mask(W) * lora() }}"
    with pytest.raises(surgery.SurgError) as raised:
        exported(compiled(architectures, "llama", rules)[0], tmp_path)
    first, second = raised.value.diagnostics
    assert first.span is not None and second.span is not None and first.span.start < second.span.start
    (note,) = second.notes
    assert note.message == "2 sites: `model.layers.0.mlp.down_proj`, `model.layers.1.mlp.down_proj`"


# --- on the command line ----------------------------------------------------------------------------------------------

SPEC = """
model "tiny" { task = sequence_classification(labels = 2) }
adapt **.self.{query,value} { with delta_lora(rank = 2, alpha = 3, start = 2)  expect 4 }
train classifier
step { optimizer = adamw(lr = 1e-2)  batch = 8  steps = 6  seed = 3 }
data "rows.jsonl" { text = "{text}"  label = kind  holdout = 0.25 }
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a spec on a saved model, in float32."""
    folder = tmp_path_factory.mktemp("project")
    save_project(folder)
    (folder / "spec.surg").write_text(SPEC)
    succeed("train", str(folder / "spec.surg"), "-o", str(folder / "run"), "--device", "cpu")
    return folder / "run"


def test_a_run_is_loaded_by_peft(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    code, out, _ = cli(capsys, "export", str(run), "--to", "peft", "-o", str(target), "--format", "json")
    assert code == 0 and json.loads(out) == {
        "run": str(run), "folder": str(target), "to": "peft", "kind": "LoRA", "rank": 4, "sites": 4,
        "modules_to_save": ["classifier"], "diagnostics": [],
    }  # fmt: skip
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run.parent / "tiny") and config["task_type"] == "SEQ_CLS"
    adapted = peft.AutoPeftModelForSequenceClassification.from_pretrained(target, num_labels=2).eval()
    step = surgery.load(run, device="cpu")
    inputs = AutoTokenizer.from_pretrained(run.parent / "tiny")(["red one", "two blue"], return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = step.forward(**inputs).logits
        torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
        base = AutoModelForSequenceClassification.from_pretrained(run.parent / "tiny", num_labels=2).eval()
        assert not torch.allclose(base(**inputs).logits, expected, atol=1e-2)


def test_an_adapter_is_replaced_as_a_whole_or_not_at_all(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "adapter"
    arguments = ("export", str(run), "--to", "peft", "-o", str(target))
    assert "4 sites as a LoRA of rank 4" in cli(capsys, *arguments)[1]
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors"}

    with monkeypatch.context() as patch:
        patch.setattr("surgery.runtime.folders.os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "no space")))
        assert cli(capsys, *arguments, "--dtype", "bfloat16")[0] == 1
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    assert cli(capsys, *arguments, "--dtype", "bfloat16")[0] == 0
    tensors = load_file(target / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if "lora" in name} == {torch.bfloat16}
    (target / "notes.txt").write_text("mine")
    code, _, err = cli(capsys, *arguments)
    assert code == 1 and "SURG064" in err and "notes.txt" in err
    assert cli(capsys, "export", str(run), "--to", "gguf", "-o", str(target))[0] == 2
    assert cli(capsys, "export", str(run), "--to", "peft", "-o", str(target / "notes.txt"))[0] == 2
