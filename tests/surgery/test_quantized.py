"""A quantized base: against dense models that hold what the codes stand for, in graph and in module scope."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.compiler.kernels.quantized_linear import dequantized, load_bitsandbytes, quantized
from surgery.compiler.library import library
from surgery.runtime import modules
from surgery.runtime.quantize import QuantizedLinear, dense_model, quantized_copy
from surgery.runtime.step import TrainingStep
from tests.command_line import cli, succeed
from tests.off_start import off_start
from tests.tokenizer import byte_level

pytestmark = pytest.mark.usefixtures("captured_once")

KINDS = ("nf4", "int8")
BITS = {"nf4": 4, "int8": 8}
ALL = "model.layers.*.{self_attn,mlp}.*_proj"
RANK, ALPHA, RATE = 4, 8, 1e-2
# Blocks of 64 numbers end with no row of 48 columns, and with each of 64.
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def llama(dtype: torch.dtype = torch.float64, **settings: int) -> Any:
    """A small Llama; in float64 sums in another order differ by nothing that shows."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **settings})).to(dtype).eval()  # type: ignore[arg-type]


def spec(
    kind: str | None = "nf4", method: str = f"lora(rank = {RANK}, alpha = {ALPHA})", sites: str = ALL, step: str = "",
    more: str = "", clauses: str = "",
) -> Any:  # fmt: skip
    setting = "" if kind is None else f"quantize = {kind}"
    return surgery.parse(f"""
        model "given" {{ task = causal_lm  {setting} }}
        adapt {sites} {{ with {method} {clauses} }}
        {more}
        step {{ optimizer = adamw(lr = {RATE})  batch = 4  steps = 9  {step} }}
    """)


def batch(rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(rows * length))
    return {"input_ids": ids, "labels": ids.clone()}


class Reference(nn.Module):
    """LoRA as its paper has it, around a dense layer."""

    def __init__(self, layer: nn.Linear, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.A, self.B = (nn.Parameter(tensor.detach().clone().to(layer.weight)) for tensor in (A, B))

    def forward(self, x: Tensor) -> Tensor:
        change = functional.linear(functional.linear(x, self.A), self.B)
        y: Tensor = self.layer(x) + ALPHA / RANK * change
        return y


def reference(kind: str, step: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A plain model of transformers with the numbers that the codes stand for, and the step's adapters."""
    model = llama(dtype).requires_grad_(False)
    sites = step.parameters_by_site
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and ".layers." in path:
            with torch.no_grad():
                layer.weight.copy_(dequantized(*quantized(layer.weight, kind), dtype))
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Reference(layer, **sites[path]))
    return model


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# --- against plain torch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"), [("nf4", ""), ("int8", ""), ("nf4", "micro_batch = 2  recompute = blocks")]
)
def test_losses_of_a_run_are_those_of_a_dense_model(kind: str, settings: str) -> None:
    step = surgery.compile(spec(kind, step=settings), model=llama())
    off_start(step, 0.05, 1)
    model = reference(kind, step)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    for number in range(5):
        given = batch(4, 10 + number)
        loss = cross_entropy(model(input_ids=given["input_ids"]).logits, given["labels"])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        assert float(step(given).loss) == pytest.approx(float(loss.detach()), rel=1e-9)
    for path, tensors in step.parameters_by_site.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, model.get_submodule(path).get_parameter(name), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_in_module_scope_are_those_of_a_dense_model(kind: str, dtype: torch.dtype) -> None:
    step = surgery.compile(spec(kind), model=llama(dtype))
    off_start(step, 0.05, 1)
    dense = reference(kind, step, dtype)
    applied = surgery.apply(spec(kind), llama(dtype))
    for path, tensors in step.parameters_by_site.items():
        for name, tensor in tensors.items():
            with torch.no_grad():
                applied.get_submodule(path).get_parameter(name).copy_(tensor)
    embedded = dense.get_input_embeddings()(batch()["input_ids"]).detach()
    found = []
    for model in (applied, dense):
        x = embedded.clone().requires_grad_()
        logits = model(inputs_embeds=x).logits
        torch.autograd.backward(cross_entropy(logits.double(), batch()["labels"]))
        own = [model.get_submodule(path).get_parameter(name).grad for path in step.parameters_by_site for name in "AB"]
        found.append([logits, x.grad, *own])
    for ours, theirs in zip(*found, strict=True):
        # In bfloat16 the reference rounds its adapters, the step's are float32 and cast where they are used.
        tight = dtype == torch.float64
        unit = 1.0 if tight else float(theirs.detach().abs().max())
        rtol, atol = (1e-7, 1e-10) if tight else (0.1, 2e-2)
        torch.testing.assert_close(ours.double() / unit, theirs.double() / unit, rtol=rtol, atol=atol)


def test_starts_are_computed_of_what_the_codes_stand_for() -> None:
    step = surgery.compile(spec(method=f"lora_xs(rank = {RANK})", sites="model.layers.*.self_attn.q_proj"), llama())
    path = "model.layers.1.self_attn.q_proj"
    weight = dequantized(*quantized(llama().get_submodule(path).weight.detach(), "nf4"), torch.float64)
    U, S, V = torch.linalg.svd(weight)
    projector = U[:, :RANK] @ U[:, :RANK].T
    found = step.parameters_by_site[path]
    torch.testing.assert_close(found["U"] @ found["U"].T, projector)
    torch.testing.assert_close(found["SV"] @ found["SV"].T, torch.diag(S[:RANK].square()), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(step.effective_weight(path), weight, rtol=1e-3, atol=1e-3)  # R starts at 1e-5


# --- which methods fit ------------------------------------------------------------------------------------------------

# One of each way to read W, x or y, or what is shared, drawn, measured or handed on.
METHODS = {
    "vera(rank = 4)": "", "oft(block = 4)": "", "ia3()": "", "hadamard()": "", "adapter()": "", "reslora(rank = 4)": "",
    "delora(rank = 4)": "", "psoft(rank = 4)": "", "eva(rank = 4)": "", "lora(rank = 4) + circulant()": "",
    "delta_lora(rank = 4, start = 1)": "update = telescope",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_method_computes_what_it_computes_over_a_dense_model(method: str) -> None:
    sites, model = "model.layers.*.self_attn.{q_proj,o_proj}", llama()
    given = {"sites": sites, "method": method}
    step = surgery.compile(spec(**given), model=model, calibration=[batch()])
    dense = dense_model(quantized_copy(model, step.plan))
    # As a branch too: folded, W and the change are rounded into one.
    other = surgery.compile(
        spec(None, clauses=f"strategy = branch {METHODS[method]}", **given), model=dense, calibration=[batch()]
    )
    off_start(step, 0.05, 1)
    off_start(other, 0.05, 1)
    for number in range(4):
        ours, theirs = (float(run(batch(4, 10 + number)).loss) for run in (step, other))
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert {site.update for site in step.plan.sites} == ({"telescope"} if "delta_lora" in method else {"none"})


@pytest.mark.parametrize("name", sorted(library()))
def test_facts_decide_which_methods_are_refused(name: str) -> None:
    """What reads W as a matrix, changes it at the start or moves it without a closed form; nothing else."""
    rank = "rank = 4" if "rank" in {parameter.name for parameter in library()[name].parameters} else ""
    given = {"sites": "model.layers.*.self_attn.q_proj", "method": f"{name}({rank})"}
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 256}))  # type: ignore[arg-type]
    try:
        facts = surgery.plan(spec(None, **given), skeleton).sites[0].facts
    except surgery.SurgError:
        pytest.skip("it cannot be on this weight at all")
    fits = not facts.needs_dense_weight and (not facts.moves_base or name == "delta_lora")
    try:
        assert surgery.plan(spec(**given), skeleton).sites[0].quantized and fits
    except surgery.SurgError as error:
        assert not fits and [found.code for found in error.diagnostics] == ["SURG025"]


def test_an_event_a_penalty_and_an_earlier_block_that_read_w_are_refused() -> None:
    texts = {
        "an event reads W": "A = state zeros[in]\n delta = B @ C\n after step { A = A + mean(W, axis = 0) }",
        "the W of an earlier block": "delta = B @ C + previous(W)",
        "it reads W other than": "delta = B @ C\n penalty = fro(W + delta)",
    }
    for reason, text in texts.items():
        method = f"method mine(rank: int = 2) {{ B = train zeros[out, rank]  C = train ones[rank, in]\n {text} }}\n"
        rule = 'model "given" { quantize = nf4 }\nadapt model.layers.*.self_attn.q_proj { with mine() }'
        program = surgery.parse(method + rule)
        with pytest.raises(surgery.SurgError, match=reason):
            surgery.plan(program, llama())


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_takes_the_bytes_that_the_plan_says(kind: str) -> None:
    step = surgery.compile(spec(kind), model=llama(torch.float32))
    found = step.plan.quantized
    assert found is not None and len(found.weights) == 21
    held = [step.weights[name + end] for name in found.weights for end in ("", "_scale")]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == found.bytes
    per_number = {"nf4": 0.5 + 4 / 64, "int8": 1.0}[kind]
    rows = sum(step.weights[name].shape[0] for name in found.weights)
    assert found.bytes == per_number * found.numbers + (4 * rows if kind == "int8" else 0)
    assert found.dense_bytes == 4 * found.numbers
    shapes = {site.shape for site in step.plan.sites}
    assert not [name for name, tensor in step.weights.items() if ".layers." in name and tuple(tensor.shape) in shapes
                and tensor.is_floating_point()]  # fmt: skip


def test_what_is_trained_whole_and_what_is_outside_of_blocks_stays_dense() -> None:
    model = llama()
    step = surgery.compile(
        spec(sites="model.layers.*.self_attn.q_proj", more="train model.layers.1.mlp.**\ntrain lm_head"), model=model
    )
    assert step.plan.quantized is not None
    assert not [name for name in step.plan.quantized.weights if "layers.1.mlp" in name or "layers" not in name]
    before = step.weights["model.layers.1.mlp.up_proj.weight"].detach().clone()
    step(batch())
    assert not torch.equal(step.weights["model.layers.1.mlp.up_proj.weight"], before)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "t5"])
def test_other_architectures(name: str, architectures: Any) -> None:
    """Conv1D, biases, no `causal`, and a layer that its class keeps in float32."""
    architecture = architectures[name]
    program = surgery.parse(architecture.spec().replace("task =", "quantize = int8  task ="))
    model = architecture.model()
    step = surgery.compile(program, model=model)
    other = surgery.compile(surgery.parse(architecture.spec()), model=dense_model(quantized_copy(model, step.plan)))
    given = {**architecture.inputs(), "labels": architecture.labels()}
    for _ in range(3):
        assert float(step(given).loss) == pytest.approx(float(other(given).loss), rel=1e-5)
    assert step.plan.quantized is not None
    assert not [path for path in step.plan.quantized.weights if path.endswith(".wo.weight")]


def test_a_given_model_is_left_as_it_is() -> None:
    model = llama()
    before, layers = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    step = surgery.compile(spec(), model=model)
    step(batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert dict(model.named_modules()) == layers and not any(
        isinstance(part, QuantizedLinear) for part in layers.values()
    )
    assert quantized_copy(model, step.plan).get_output_embeddings().weight is model.lm_head.weight  # type: ignore[operator]


def test_apply_changes_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("on purpose")

    model = llama()
    layers = dict(model.named_modules())
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        patch.setattr(modules, "attach", broken)
        surgery.apply(spec(), model)
    assert dict(model.named_modules()) == layers
    surgery.apply(spec(sites="model.layers.*.self_attn.q_proj"), model)
    kinds = {type(model.get_submodule(f"model.layers.0.self_attn.{name}_proj")).__name__ for name in "qkvo"}
    assert kinds == {"Adapted", "QuantizedLinear"}


def test_tied_and_shared_layers_stay_so() -> None:
    model = llama()
    first, second, third = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    third.mlp = first.mlp
    plan = surgery.plan(spec(sites="model.layers.*.self_attn.q_proj"), model)
    assert plan.quantized is not None
    twin = quantized_copy(model, plan)
    layers: Any = twin.get_submodule("model.layers")
    assert layers[1].mlp.up_proj.weight is layers[0].mlp.up_proj.weight and layers[2].mlp is layers[0].mlp
    numbers = {id(weight): weight for name, weight in model.named_parameters() if name in plan.quantized.weights}
    assert plan.quantized.numbers == sum(weight.numel() for weight in numbers.values())


# --- compiled, saved, merged, exported --------------------------------------------------------------------------------


@pytest.mark.usefixtures("partitioned_alone")
def test_a_compiled_step_takes_the_same_steps() -> None:
    steps = [surgery.compile(spec(step=f"compile = {how}"), model=llama()) for how in ("on", "off")]
    for number in range(3):
        ours, theirs = (float(step(batch(4, 10 + number)).loss) for step in steps)
        assert ours == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora(rank = 4, dropout = 0.1)", "delta_lora(rank = 4, start = 1)"])
def test_a_resumed_run_goes_on_to_the_bit(method: str, kind: str, tmp_path: Path) -> None:
    step = surgery.compile(spec(kind, method), model=llama(torch.float32))
    for _ in range(3):
        step(batch())
    step.save(tmp_path / "run")
    expected = [float(step(batch()).loss) for _ in range(3)]
    again = surgery.load(tmp_path / "run", model=llama(torch.float32))
    assert [float(again(batch()).loss) for _ in range(3)] == expected
    assert not [name for name in step.state_dict()["weights"] if name.endswith(("weight", "_scale"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run over a folder of a model, moved off its start: `run`, beside `tiny`."""
    folder = tmp_path_factory.mktemp("quantized")
    llama(torch.float32, intermediate_size=128).save_pretrained(folder / "tiny")  # bitsandbytes' layers take no 48
    for kind in KINDS:
        text = spec(kind).source.text.replace('"given"', '"tiny"')
        step = surgery.compile(surgery.parse(text, folder=folder), device="cpu")
        assert all(isinstance(step.model.get_submodule(site.path), QuantizedLinear) for site in step.plan.sites)
        off_start(step, 0.05, 1)
        step.save(folder / kind)
    yield folder


@pytest.mark.parametrize("kind", KINDS)
def test_merged_applied_and_generated_are_the_run(kind: str, run: Path) -> None:
    step = surgery.load(run / kind, device="cpu")
    logits = step.forward(input_ids=batch()["input_ids"]).logits
    merged: Any = step.merge()
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not any(isinstance(part, QuantizedLinear) for part in merged.modules())
    applied: Any = surgery.apply(run / kind, AutoModelForCausalLM.from_pretrained(run / "tiny"))
    with torch.no_grad():
        for model in (merged, applied):
            torch.testing.assert_close(model(**batch()).logits, logits, rtol=1e-5, atol=1e-5)
        prompt = batch()["input_ids"][:2]
        greedy = [model.generate(prompt, max_new_tokens=8, do_sample=False) for model in (merged, applied)]
    assert torch.equal(greedy[0], greedy[1])


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_adapter_onto_the_library_s_own_quantized_model(kind: str, run: Path) -> None:
    succeed("export", str(run / kind), "--to", "peft", "-o", str(run / f"{kind}_adapter"))
    config = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[kind]
    base = AutoModelForCausalLM.from_pretrained(
        run / "tiny", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    # In evaluation the library rounds: of nf4 some CPUs run a product of bfloat16, of int8 activations have 8 bits too.
    theirs = PeftModel.from_pretrained(base, run / f"{kind}_adapter").train()
    step = surgery.load(run / kind, device="cpu")
    with torch.no_grad():
        found, expected = (model(input_ids=batch()["input_ids"]).logits for model in (step.forward, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_missing_library_is_said_at_the_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.surg"
    path.write_text(spec().source.text)
    program = surgery.parse(path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    load_bitsandbytes.cache_clear()
    assert surgery.plan(program, llama()).quantized is not None
    with pytest.raises(surgery.SurgError) as raised:
        surgery.compile(program, model=llama())
    (found,) = raised.value.diagnostics
    assert (found.code, found.help) == ("SURG063", 'pip install "surg[quantize]"')
    assert found.span is not None and found.span.source.text[found.span.start : found.span.end] == "quantize = nf4"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_the_command_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned, trained, interrupted, resumed, generated from, merged and exported: one model all the way."""
    tokenizer = byte_level()
    llama(torch.float32, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    rows = [{"text": f"{number} and {number + 1} make {2 * number + 1}"} for number in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = 'data "rows.jsonl" { text = text  max_length = 32 }'
    text = spec(kind, step="save = every(2)  log = every(1)", more=data).source.text
    (tmp_path / "a.surg").write_text(text.replace('"given"', '"tiny"'))

    def said(*arguments: str) -> str:
        code, out, err = cli(capsys, *arguments)
        assert code == 0, err
        return out + err

    spec_path, run, broken = (str(tmp_path / name) for name in ("a.surg", "run", "broken"))
    assert f"numbers, in {kind}: " in said("plan", spec_path)
    said("train", spec_path, "-o", run, "--device", "cpu")
    taken, original = 0, TrainingStep.__call__

    def interrupted(self: TrainingStep, *arguments: Any, **named: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 6:
            raise KeyboardInterrupt
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", interrupted)
        assert cli(capsys, "train", spec_path, "-o", broken, "--device", "cpu")[0] != 0
    said("train", spec_path, "-o", broken, "--resume", "--device", "cpu")
    for file in ("adapters.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(Path(run) / file), load_file(Path(broken) / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    merged_note = said("merge", run, "-o", str(tmp_path / "merged"))
    assert f"21 weights that the run keeps in {kind}" in merged_note
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    step = surgery.load(run, device="cpu")
    logits = step.forward(input_ids=batch()["input_ids"]).logits
    torch.testing.assert_close(merged(input_ids=batch()["input_ids"]).logits.detach(), logits, rtol=1e-5, atol=1e-5)

    prompt = tokenizer("3 and 4", return_tensors="pt")
    answer = merged.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    told = said("generate", run, "--prompt", "3 and 4", "--max-new-tokens", "6", "--device", "cpu")
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert text and text in told

    note = said("export", run, "--to", "peft", "-o", str(tmp_path / "adapter"))
    assert f"over weights in {kind}: load the adapter onto BitsAndBytesConfig(load_in_{BITS[kind]}bit" in note
    base = dense_model(quantized_copy(AutoModelForCausalLM.from_pretrained(tmp_path / "tiny"), step.plan))
    peft_logits = PeftModel.from_pretrained(base, tmp_path / "adapter")(input_ids=batch()["input_ids"]).logits
    torch.testing.assert_close(peft_logits.detach(), logits, rtol=1e-5, atol=1e-5)


def test_the_plan_says_what_the_base_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "tiny")
    (tmp_path / "a.surg").write_text(spec().source.text.replace('"given"', '"tiny"'))
    code, said, _ = cli(capsys, "plan", str(tmp_path / "a.surg"))
    found = surgery.plan(spec(), llama()).quantized
    assert code == 0 and found is not None
    assert f"{found.numbers:,} numbers, in nf4: {found.bytes:,} bytes instead of {found.dense_bytes:,}" in " ".join(
        said.split()
    )
