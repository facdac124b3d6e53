"""Adapters that peft wrote, with tensors that are off their start, as specs and runs: the same logits here."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import surgery
from surgery.peft.importing import import_adapter, save_run
from surgery.peft.patterns import patterns_of
from surgery.peft.write import export
from tests.command_line import cli
from tests.project import save_project

pytestmark = pytest.mark.usefixtures("captured_once")

ENCODER, DECODER = ["query", "value", "output.dense"], ["q_proj", "down_proj"]
TWO = ["q_proj", "o_proj"]


@dataclass(frozen=True)
class Case:
    """An adapter of peft, and what the spec of it says."""

    config: Any  # called once per test: peft changes the configs that it is given
    words: tuple[str, ...]
    model: str = "llama"
    tolerance: float = 1e-10
    settings: dict[str, Any] = field(default_factory=dict)


def lora(**settings: Any) -> Any:
    return lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TWO, **settings})


CASES = {
    "lora": Case(lora(lora_dropout=0.1), ("adapt model.layers.*.self_attn.{o_proj,q_proj}", "expect 4",
                                          "lora(rank = 4, alpha = 6, dropout = 0.1)")),
    "rslora": Case(lora(use_rslora=True), ("rslora(rank = 4, alpha = 6)",)),
    "dora": Case(lora(use_dora=True), ("dora(rank = 4, alpha = 6)",)),
    "rsdora": Case(lora(use_dora=True, use_rslora=True), ("dora(rank = 4, alpha = 12)",)),
    "patterns": Case(
        lora(rank_pattern={"q_proj": 2, "layers.1.self_attn.o_proj": 3},
             alpha_pattern={r"^.*\.0\.self_attn\.o_proj": 5}),
        ("lora(rank = 2, alpha = 6)", "lora(rank = 3, alpha = 6)", "lora(rank = 4, alpha = 5)"),
    ),
    "regex": Case(lora(target_modules=r".*layers\.\d+\.(mlp|self_attn)\.(up|k)_proj"), ("mlp.up_proj", "k_proj")),
    "all_linear": Case(lora(target_modules="all-linear"),
                       ("{down_proj,gate_proj,up_proj}", "{k_proj,o_proj,q_proj,v_proj}")),
    "excluded": Case(lora(target_modules=DECODER, exclude_modules=r".*0\.mlp.*"), ("model.layers.1.mlp.down_proj",)),
    "layers": Case(lora(layers_to_transform=[1], layers_pattern="layers"),
                   ("model.layers.1.self_attn.{o_proj,q_proj}",)),
    "gaussian": Case(lora(init_lora_weights="gaussian"), ("lora(rank = 4, alpha = 6)",)),
    "orthogonal": Case(lora(init_lora_weights="orthogonal"), ("lora(rank = 4, alpha = 6)",)),
    # peft subtracts the start from W again when it loads such an adapter, in float32
    "pissa": Case(lora(init_lora_weights="pissa", use_rslora=True), ("pissa(rank = 4, alpha = 12)",), tolerance=1e-4),
    "olora": Case(lora(init_lora_weights="olora"), ("olora(rank = 4, alpha = 6)",), tolerance=1e-4),
    "conv1d": Case(lora(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True), ("transformer.h.*",), "gpt2"),
    "embedding": Case(lora(target_modules=["word_embeddings", "query"], task_type="SEQ_CLS"),
                      ("adapt bert.embeddings.word_embeddings", "train classifier", "labels = 3"), "bert"),
    "convolution": Case(lora(target_modules=["projection"], use_dora=True), ("image_classification",), "vit"),
    "saved": Case(lora(modules_to_save=["norm", "lm_head"]),
                  ("train model.norm", "train lm_head", "input_layernorm")),
    "biases": Case(lora(target_modules=ENCODER, bias="all", task_type="SEQ_CLS"),
                   ("train bert.encoder", ".bias"), "bert"),
    "tied": Case(lora(target_modules=["lm_head", "q_proj"]), ("adapt lm_head {", "untie"), "qwen2"),
    "tied_together": Case(lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
                          ("adapt lm_head {", " tie"), "qwen2"),
    "saved_embedding": Case(lora(target_modules=["embed_tokens", "q_proj"]), ("adapt model.embed_tokens {",)),
    "saved_pair": Case(lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), ("train",), "qwen2"),
    "trained_tie": Case(lora(modules_to_save=["embed_tokens"], target_modules=["q_proj"]),
                        ("train model.embed_tokens",)),
    "experts": Case(lora(target_modules=TWO, target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
                    ("model.layers.*.mlp.experts.{down_proj,gate_up_proj}",), "qwen3_moe"),
    "router": Case(lora(target_modules=[], target_parameters=["mlp.gate.weight"]), ("mlp.gate",), "qwen3_moe"),
    "adalora": Case(
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=ENCODER,
                                   lora_dropout=0.1),
        ("pruned_adalora(rank = 4, alpha = 6, initial = 4, dropout = 0.1)", "P @ diag(E) @ Q"), "bert",
    ),
    "vera": Case(lambda: peft.VeraConfig(r=6, target_modules=DECODER), ("vera(rank = 6)",)),
    "loha": Case(lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=DECODER, rank_pattern={"q_proj": 2}),
                 ("loha(rank = 2, alpha = 6)",)),
    "lokr": Case(lambda: peft.LoKrConfig(r=2, alpha=3, decompose_factor=4, target_modules=DECODER),
                 ("lokr(rank = 2, alpha = 3, factor = 4)",)),
    "ia3": Case(lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
                ("with ia3()", "with ia3_input()")),
    "oft": Case(lambda: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=DECODER),
                ("oft(block = 8)",)),
    "oft_series": Case(lambda: peft.OFTConfig(oft_block_size=8, target_modules=DECODER), ("oft_series(block = 8)",)),
    "hira": Case(lambda: peft.HiraConfig(r=4, target_modules=DECODER), ("hira(rank = 4)",)),
    "delora": Case(lambda: peft.DeloraConfig(r=4, delora_lambda=3, target_modules=DECODER),
                   ("delora(rank = 4, strength = 3)",)),
    "c3a": Case(lambda: peft.C3AConfig(block_size=8, target_modules=DECODER), ("c3a(block = 8)",), tolerance=1e-5),
}  # fmt: skip


@pytest.fixture(autouse=True)
def experts_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's grouped product takes no float64; that of transformers does."""
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *given: False)


def saved(architecture: Any, folder: Path) -> Path:
    """A folder with the model of an architecture in float64."""
    architecture.model().double().save_pretrained(folder)
    return folder


def adapted(architecture: Any, base: Path, config: Any, folder: Path, seed: int = 3) -> Any:
    """peft's model as it is loaded from the folder that it was saved to, with everything trained off its start."""
    own = type(architecture.model())
    dtype = torch.float32 if str(getattr(config, "init_lora_weights", "")) in ("pissa", "olora") else torch.float64
    wrapped: Any = peft.get_peft_model(own.from_pretrained(base, dtype=dtype), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                spread = 0.02 if "modules_to_save" in name or "bias" in name else 0.1
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(parameter))
    wrapped.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(own.from_pretrained(base, dtype=dtype), folder).double().eval()


def inputs_of(architecture: Any) -> dict[str, Tensor]:
    given = architecture.inputs(4, 9)
    return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_peft_gives_the_same_logits(
    name: str, architectures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    architecture = architectures[case.model]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = adapted(architecture, saved(architecture, tmp_path / "model"), case.config(), tmp_path / "adapter")
    spec, run = tmp_path / "spec.surg", tmp_path / "run"
    arguments: tuple[str, ...] = (
        "import",
        str(tmp_path / "adapter" / "adapter_config.json"),
        "-o",
        str(spec),
        "--run",
        str(run),
    )
    if name == "router":  # its config tells no task
        arguments = (*arguments, "--task", "causal_lm")
    code, out, err = cli(capsys, *arguments, "--format", "json")
    assert code == 0, err + out
    told = json.loads(out)
    text = spec.read_text()
    assert all(word in text for word in case.words), text
    plan = surgery.plan(surgery.parse(spec))
    assert told["sites"] == len(plan.sites) and told["run"] == str(run)
    step, inputs = surgery.load(run, device="cpu"), inputs_of(architecture)
    with torch.no_grad():
        expected = theirs(**inputs).logits
        torch.testing.assert_close(step.forward(**inputs).logits, expected, rtol=case.tolerance, atol=case.tolerance)
        assert float((step.model(**inputs).logits - expected).abs().max()) > 1e-3


def made(config: Any, architecture: Any, folder: Path) -> Path:
    """A folder with an adapter for the model in `model` beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted(architecture, saved(architecture, folder / "model"), config, folder / "adapter")
    return folder / "adapter"


def edited(adapter: Path, **settings: Any) -> Path:
    """The adapter with other settings in its config."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | settings))
    return adapter


def test_ranks_that_adalora_pruned(architectures: Any, tmp_path: Path) -> None:
    model = saved(architectures["llama"], tmp_path / "model")
    own = type(architectures["llama"].model())
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=TWO, task_type="CAUSAL_LM"
    )
    wrapped: Any = peft.get_peft_model(own.from_pretrained(model), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(
                    0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)).to(parameter)
                )
    masks = {"0.self_attn.q_proj": [True, False, True, True], "1.self_attn.q_proj": [False] * 4,
             "0.self_attn.o_proj": [True] * 4, "1.self_attn.o_proj": [False, True, False, False]}  # fmt: skip
    wrapped.peft_config["default"].rank_pattern = {f"model.layers.{path}.lora_E": mask for path, mask in masks.items()}
    wrapped.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(own.from_pretrained(model), tmp_path / "adapter").eval()
    imported = import_adapter(tmp_path / "adapter", tmp_path)
    (tmp_path / "spec.surg").write_text(imported.text)
    step = save_run(imported, tmp_path / "adapter", tmp_path / "spec.surg", tmp_path / "run")
    assert sorted(site.rank or 0 for site in step.plan.sites) == [1, 3, 4]  # of four modules one has nothing left
    inputs = architectures["llama"].inputs(4, 9)
    with torch.no_grad():
        torch.testing.assert_close(step.forward(**inputs).logits, theirs(**inputs).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["lora", "patterns", "regex", "all_linear", "excluded", "layers", "saved", "biases", "experts", "ia3"]
)
def test_a_config_alone_means_the_same_modules(name: str, architectures: Any, tmp_path: Path) -> None:
    case = CASES[name]
    adapter = made(case.config(), architectures[case.model], tmp_path)
    expected = import_adapter(adapter, tmp_path).text
    (adapter / "adapter_model.safetensors").unlink()
    alone = import_adapter(adapter / "adapter_config.json", tmp_path)
    rules = [sorted(re.split(r"\n(?=adapt|train|model)", text)[2:]) for text in (alone.text, expected)]
    assert alone.tensors == {} and rules[0] == rules[1]  # the labels are read off the head's tensors
    plan = surgery.plan(surgery.parse(alone.text, tmp_path))
    assert len(plan.sites) == alone.sites


def test_where_the_model_is_out_of_reach_names_come_from_the_tensors(
    architectures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter = edited(
        made(lora()(), architectures["llama"], tmp_path), base_model_name_or_path="no-org/none", revision="v1"
    )
    text = import_adapter(adapter, tmp_path).text
    assert 'model "no-org/none" {\n    task = causal_lm\n    revision = "v1"' in text or 'revision = "v1"' in text
    assert "adapt model.layers.[0..1].self_attn.{o_proj,q_proj}" in text
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(surgery.SurgError, match="SURG030"):
        import_adapter(adapter, tmp_path)
    assert "[0..1]" not in import_adapter(adapter, tmp_path, model=str(tmp_path / "model")).text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "BOFT"}, "`peft_type = BOFT` has no counterpart"),
        ({"lora_bias": True}, "`lora_bias`: True has no counterpart"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "`layer_replication`"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices`"),
        ({"init_lora_weights": "loftq"}, "`init_lora_weights`: the start `loftq` changes the model's weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights`"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "`use_dora`"),
        ({"a_setting_of_later": {"on": True}}, "`a_setting_of_later`"),
        ({"task_type": "QUESTION_ANS"}, "--task causal_lm|"),
        ({"base_model_name_or_path": None}, "give the model: --model NAME"),
        ({"peft_type": None}, "it names no `peft_type`"),
    ],
)
def test_what_has_no_counterpart(settings: dict[str, Any], words: str, architectures: Any, tmp_path: Path) -> None:
    adapter = edited(made(lora()(), architectures["llama"], tmp_path), **settings)
    with pytest.raises(surgery.SurgError) as raised:
        import_adapter(adapter, tmp_path)
    assert {found.code for found in raised.value.diagnostics} == {"SURG065"} and words in str(raised.value)


@pytest.mark.parametrize(
    ("config", "name", "words"),
    [
        (peft.VeraConfig(r=4, target_modules=TWO, save_projection=False), "llama", "`save_projection`"),
        (peft.LoKrConfig(r=2, decompose_both=True, decompose_factor=8, target_modules=TWO), "llama", "decompose_both"),
        (peft.LoKrConfig(r=2, target_modules=["up_proj"]), "llama", "`decompose_factor`: the first matrix of"),
        (peft.OFTConfig(oft_block_size=8, coft=True, target_modules=TWO), "llama", "`coft`"),
        (peft.OFTConfig(oft_block_size=8, block_share=True, target_modules=TWO), "llama", "`block_share`"),
        (peft.LoraConfig(target_modules=["word_embeddings"], use_dora=True), "bert", "columns of its W"),
        (peft.LoraConfig(target_modules=["lm_head", "embed_tokens"]), "qwen2", "are tied, and each is adapted"),
        (peft.OFTConfig(oft_block_size=3, target_modules=["projection"]), "vit", "is a Conv2d"),
    ],
)  # fmt: skip
def test_what_a_type_has_no_counterpart_for(
    config: Any, name: str, words: str, architectures: Any, tmp_path: Path
) -> None:
    adapter = made(config, architectures[name], tmp_path)
    with pytest.raises(surgery.SurgError, match=re.escape(words)) as raised:
        import_adapter(adapter, tmp_path)
    assert {found.code for found in raised.value.diagnostics} == {"SURG065"}


def test_files_that_are_wrong(architectures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = made(lora()(), architectures["llama"], tmp_path)
    spec, arguments = tmp_path / "spec.surg", ("--model", str(tmp_path / "model"), "--format", "json")

    def said(*more: str) -> str:
        code, out, _ = cli(capsys, "import", str(adapter), "-o", str(spec), *arguments, *more)
        (found,) = json.loads(out)["diagnostics"]
        assert code == 1 and found["code"] == "SURG065" and not spec.exists()
        return str(found["message"])

    stored = adapter / "adapter_model.safetensors"
    tensors = load_file(stored)
    for change, words in (
        ({"model.layers.0.mlp.odd": torch.zeros(2)}, "`model.layers.0.mlp.odd`: it is of none"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 7)}, "is [4, 7], and the model's is [4, 32]"),
        ({"model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, "LlamaForCausalLM has no such module"),
        ({"model.layers.0.self_attn.k_proj.lora_A.weight": torch.zeros(4, 32)}, "the adapter has no such tensor"),
    ):
        save_file(tensors | {f"base_model.model.{name}": tensor for name, tensor in change.items()}, stored)
        assert words in said("--run", str(tmp_path / "run")) and not (tmp_path / "run").exists()
    stored.write_bytes(b"no tensors")
    assert "cannot be read" in said()
    stored.rename(adapter / "adapter_model.bin")
    assert "it is a pickle" in said()
    (adapter / "adapter_config.json").write_text("{")
    assert "cannot be read" in said()
    (adapter / "adapter_config.json").unlink()
    assert "no such file" in said()


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("llama", "adapt model.layers.*.self_attn.q_proj { with delta_lora(rank = 2, start = 0)  update = literal }"),
        (
            "llama",
            "adapt **.up_proj { with dora(rank = 3) }  adapt **.q_proj { with lora(rank = 2) }  train model.norm",
        ),
        ("qwen2", "adapt lm_head { with lora(rank = 3)  tie }"),
        ("qwen3_moe", "adapt model.layers.*.mlp.experts.{gate_up_proj,down_proj} { with lora(rank = 3) }"),
        ("bert", "adapt **.query { with lora(rank = 3) }  train **.query.bias  train classifier"),
        ("qwen2", "adapt **.q_proj { with lora(rank = 3) }  train model.embed_tokens"),
        ("gpt2", "adapt transformer.h.*.attn.c_attn { with melora(rank = 1, groups = 4) }"),
    ],
)
def test_a_run_goes_to_peft_and_back(name: str, rules: str, architectures: Any, tmp_path: Path) -> None:
    """Export, import, export: the same logits, and the second adapter is the first."""
    architecture = architectures[name]
    model = saved(architecture, tmp_path / "model")
    labels = f"{architecture.task}(labels = 3)" if "classification" in architecture.task else architecture.task
    settings = "step { optimizer = sgd(lr = 0.1)  batch = 4  steps = 9  compile = off }"
    program = surgery.parse(f'model "{model}" {{ task = {labels} }}\n{rules}\n{settings}', tmp_path)
    step, inputs = surgery.compile(program), inputs_of(architecture)
    for _ in range(3):
        step({**inputs, "labels": architecture.labels()})
    first = export(step, tmp_path, tmp_path / "first", torch.float64)
    imported = import_adapter(tmp_path / "first", tmp_path)
    again = save_run(imported, tmp_path / "first", tmp_path / "spec.surg", tmp_path / "run")
    with torch.no_grad():
        expected = step.forward(**inputs).logits
        torch.testing.assert_close(again.forward(**inputs).logits, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(again.merge()(**inputs).logits, expected, rtol=1e-10, atol=1e-10)
        assert float((step.model(**inputs).logits - expected).abs().max()) > 1e-4
    assert {site.path for site in again.plan.sites} == {site.path for site in step.plan.sites}
    second = export(surgery.load(tmp_path / "run", device="cpu"), tmp_path, tmp_path / "second", torch.float64)
    for made_of in (first.config, second.config):
        made_of["target_modules"] = sorted(made_of["target_modules"])
    assert second.config == first.config
    torch.testing.assert_close(second.tensors, first.tensors, rtol=1e-12, atol=1e-12)
    assert import_adapter(tmp_path / "second", tmp_path).text == imported.text


def test_patterns_mean_the_paths_and_no_others() -> None:
    layers = [f"h.{layer}.{name}" for layer in range(4) for name in ("q", "v")]
    assert patterns_of(layers) == ["h.[0..3].{q,v}"]
    assert patterns_of(layers, [*layers, "h.0.k", "head"]) == ["h.*.{q,v}"]
    assert patterns_of(layers[:4], layers) == ["h.[0..1].{q,v}"]
    assert patterns_of([*layers[:2], *layers[4:], "head"]) == ["h.{0,2,3}.{q,v}", "head"]
    assert patterns_of(["a.0.b.0.c", "a.0.b.1.c", "a.1.b.0.c"]) == ["a.0.b.[0..1].c", "a.1.b.0.c"]
    assert patterns_of([]) == []


def test_an_imported_run_is_evaluated_merged_and_exported(
    architectures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_project(tmp_path)
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    wrapped: Any = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(tmp_path / "tiny"), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    (tmp_path / "more.surg").write_text('data "rows.jsonl" { text = "{text}"  label = kind  holdout = 0.25 }\n')
    spec, run = str(tmp_path / "spec.surg"), str(tmp_path / "run")
    arguments = ("import", str(tmp_path / "adapter"), "-o", spec, "--run", run, "--add", str(tmp_path / "more.surg"))
    assert cli(capsys, *arguments)[1] == f"{spec}: 2 sites; {run}: their tensors\n"
    assert cli(capsys, *arguments)[0] == 2  # never over what is there
    Path(spec).unlink()
    assert cli(capsys, *arguments)[0] == 2
    code, out, _ = cli(capsys, "eval", run, "--format", "json", "--device", "cpu")
    assert code == 0 and json.loads(out)["rows"] == 15
    assert cli(capsys, "merge", run, "-o", str(tmp_path / "merged"))[0] == 0
    assert cli(capsys, "export", run, "--to", "peft", "-o", str(tmp_path / "again"))[0] == 0
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    torch.testing.assert_close(second, first)
    assert cli(capsys, "import", str(tmp_path / "again"), "-o", str(tmp_path / "s.surg"), "--task", "chess")[0] == 2
