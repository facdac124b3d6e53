"""`surgery.apply`: modules replaced in place, all or none; `generate` and `Trainer` work as in graph scope."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import surgery
from surgery.optimizers import OPTIMIZERS
from surgery.runtime.attach import Adapted

pytestmark = pytest.mark.usefixtures("captured_once")

SPEC = """
adapt {pattern} {{ with {method} }}
step {{ optimizer = adamw(lr = 1e-2)  batch = 4  steps = 3  schedule = linear  clip = 1.0  loss = causal_lm }}
"""


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tokens(rows: int = 4, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def disturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator), alpha=1.0)
                assert name.rsplit(".", 1)[-1] in ("A", "B", "m")


@pytest.mark.parametrize(("make", "pattern"), [(llama, "model.layers.**.*_proj"), (gpt2, "transformer.h.** : Conv1D")])
@pytest.mark.parametrize("method", ["lora(rank = 4)", "dora(rank = 4, dropout = 0.1)"])
def test_the_model_starts_equal_and_keeps_working(make: Any, pattern: str, method: str, tmp_path: Path) -> None:
    model: Any = make()
    names = [name for name, _ in model.named_parameters()]
    ids = tokens()
    with torch.no_grad():
        before = model(ids).logits
    adapted = surgery.apply(surgery.parse(SPEC.format(pattern=pattern, method=method)), model)
    assert id(adapted) == id(model)
    assert type(model) is type(make())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == names
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before)
    disturb(model)
    with torch.no_grad():
        changed = model(ids).logits
        assert not torch.allclose(changed, before)
        torch.testing.assert_close(copy.deepcopy(model)(ids).logits, changed)
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        grown = ids
        for _ in range(4):  # greedy without a cache: the same tokens
            grown = torch.cat([grown, model(grown).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated[:, : grown.shape[1]], grown[:, : generated.shape[1]])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_dropout_follows_the_mode_of_the_module() -> None:
    model = llama()
    program = surgery.parse(SPEC.format(pattern="**.q_proj", method="lora(rank = 4, dropout = 0.5)"))
    surgery.apply(program, model)
    disturb(model)
    ids = tokens()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The same rows in a fixed order."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class InOrder(Trainer):
    """Trainer without shuffling."""

    def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def test_three_trainer_steps_have_the_losses_of_the_graph(tmp_path: Path) -> None:
    spec = SPEC.format(pattern="model.layers.**.*_proj", method="lora(rank = 4)")
    ids = tokens(rows=12)
    step = surgery.compile(surgery.parse(spec), model=llama(), example_inputs={"input_ids": ids[:4]})
    expected = [float(step({"input_ids": rows, "labels": rows}).loss) for rows in torch.split(ids, 4)]

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2, weight_decay=0.0,
        lr_scheduler_type="linear", logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        max_grad_norm=1.0,
    )  # fmt: skip
    trainer = InOrder(model=surgery.apply(surgery.parse(spec), llama()), args=arguments, train_dataset=Rows(ids))
    trainer.train()
    found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("adapt **.q_proj { with lora(rank = 4) }\nadapt **.k_prj { with lora(rank = 4) }", "SURG020"),
        ("adapt **.q_proj { with lora(rank = 4) }\nadapt **.k_proj { with reslora(rank = 4) }", "SURG060"),
        ("adapt model.** { with lora(rank = 4) }", "SURG025"),
    ],
)
def test_nothing_is_changed_by_a_program_that_does_not_fit(rule: str, code: str) -> None:
    model = llama()
    before = copy.deepcopy(model)
    with pytest.raises(surgery.SurgError) as raised:
        surgery.apply(surgery.parse(rule), model)
    assert {found.code for found in raised.value.diagnostics} == {code}
    assert str(model) == str(before)
    assert all(parameter.requires_grad for parameter in model.parameters())


OF_ITS_OWN = {"loko": "loko(tokens = [3, 4])", "lora_rite": "lora_rite(lr = 1e-3)"}
METHODS = {"geolora": "geolora(rank = 4)", "lora_fa": "lora_fa(rank = 4)"}


@pytest.mark.parametrize("name", sorted(name for name, kind in OPTIMIZERS.items() if kind.needs is not None))
def test_an_optimizer_that_another_trainer_has_not_is_refused(name: str) -> None:
    """Whatever it needs: factors, or outputs of the model; and nothing is changed."""
    optimizer = OF_ITS_OWN.get(name, f"{name}(adamw(lr = 1e-3))")
    text = f"adapt **.q_proj {{ with {METHODS.get(name, 'lora(rank = 4)')} }}\n"
    program = surgery.parse(text + f"step {{ optimizer = {optimizer}  loss = causal_lm }}")
    model = llama()
    with pytest.raises(surgery.SurgError, match=f"the spec's {name} would not run") as raised:
        surgery.apply(program, model)
    (found,) = raised.value.diagnostics
    assert found.code == "SURG060" and found.span is not None
    assert found.span.source.text[found.span.start : found.span.end] == optimizer
    assert not any(isinstance(module, Adapted) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_shared_tensor_lives_once_on_the_root(tmp_path: Path) -> None:
    model = llama()
    program = surgery.parse("""
        method one_basis(rank: int = 4) {
            A = train kaiming_uniform[rank, in] shared by model
            B = train zeros[out, rank]
            delta = B @ A
        }
        adapt model.layers.*.self_attn.{q_proj,k_proj} { with one_basis() }
    """)
    plan = surgery.plan(program, model)
    surgery.apply(program, model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(parameter.numel() for parameter in trained.values()) == plan.totals.trainable
    assert [name for name in trained if "shared" in name] == ["surgery_shared.shared_rule0_A"]
    with torch.no_grad():
        model.surgery_shared.shared_rule0_A.fill_(1.0)
        for name, parameter in trained.items():
            if name.endswith(".B"):
                parameter.fill_(0.01)
        torch.testing.assert_close(copy.deepcopy(model)(tokens()).logits, model(tokens()).logits)
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("update", ["literal", "telescope"])
def test_a_trained_run_attaches_to_a_model(update: str, tmp_path: Path) -> None:
    spec = SPEC.format(pattern="**.q_proj", method=f"delta_lora(rank = 4, start = 0)  update = {update}")
    ids = tokens()
    step = surgery.compile(surgery.parse(spec), model=llama(), example_inputs={"input_ids": ids})
    for rows in torch.split(ids.repeat(3, 1), 4):
        step({"input_ids": rows, "labels": rows})
    step.save(tmp_path / "run")
    model: Any = surgery.apply(tmp_path / "run", llama())
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, step.forward(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["names", "sizes", "in_features", "shared", "T"])
def test_a_tensor_may_have_any_name(name: str) -> None:
    text = f"method m() {{ {name} = train normal(0.1)[out, in];  delta = {name} }}\nadapt first {{ with m() }}"
    model = nn.ModuleDict({"first": nn.Linear(5, 4)})
    x, linear = torch.randn(3, 5), copy.deepcopy(model["first"])
    surgery.apply(surgery.parse(text), model)
    own = model["first"].get_parameter(name)
    torch.testing.assert_close(model["first"](x), linear(x) + x @ own.T)
    torch.testing.assert_close(copy.deepcopy(model)["first"](x), linear(x) + x @ own.T)


def test_a_run_that_moved_an_untied_head_leaves_the_embedding(tmp_path: Path, architectures: Any) -> None:
    qwen = architectures["qwen2"]
    model, inputs = qwen.model(), qwen.inputs()
    text = "adapt lm_head { with delta_lora(rank = 2, start = 0)  untie  update = literal }\n"
    text += "step { optimizer = sgd(lr = 0.5)  batch = 4  steps = 4  loss = causal_lm }"
    step = surgery.compile(surgery.parse(text), model=model, example_inputs=inputs)
    for _ in range(4):
        step({**inputs, "labels": qwen.labels()})
    step.save(tmp_path / "run")
    expected = step.forward(**inputs).logits
    attached = surgery.apply(tmp_path / "run", copy.deepcopy(model))
    for other in (attached, step.merge()):
        assert torch.equal(other.get_parameter("model.embed_tokens.weight"), model.model.embed_tokens.weight)
        torch.testing.assert_close(other(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_second_program_is_refused() -> None:
    model = llama()
    program = surgery.parse(SPEC.format(pattern="**.q_proj", method="lora(rank = 4)"))
    surgery.apply(program, model)
    with pytest.raises(surgery.SurgError, match="SURG060.*adapted already"):
        surgery.apply(surgery.parse(SPEC.format(pattern="**.k_proj", method="lora(rank = 4)")), model)


@pytest.mark.parametrize("method", ["lora(rank = 4)", "dora(rank = 4)", "vera(rank = 4)"])
def test_kernels_are_saved_exported_and_compiled_with_the_modules(method: str, tmp_path: Path) -> None:
    """A whole saved module, torch.export and torch.compile see the kernel as one operation, and compute the same."""
    program = surgery.parse(SPEC.format(pattern="model.layers.**.*_proj", method=f"{method}  strategy = branch"))
    model: Any = surgery.apply(program, llama())
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids, trained = tokens(), [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        expected = model(ids).logits
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
        exported: Any = torch.export.export(model, (), {"input_ids": ids}, strict=False)
        assert any(str(node.target) == "surgery.low_rank_linear.default" for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(input_ids=ids).logits, expected)
    gradients = torch.autograd.grad(model(ids).logits.sin().sum(), trained)
    compiled = torch.compile(model, backend="aot_eager")(ids).logits  # type: ignore[no-untyped-call]
    torch.testing.assert_close(compiled, expected)
    for ours, theirs in zip(torch.autograd.grad(compiled.sin().sum(), trained), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
