"""Every kind of weight that a method can adapt, against a plain copy of the model that holds the effective weight."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import surgery
from surgery.compiler.algebra.base import logical, stacked, stored_like
from surgery.compiler.algebra.evaluate import Evaluator
from surgery.compiler.algebra.experts import Experts
from surgery.compiler.algebra.instance import instance

pytestmark = pytest.mark.usefixtures("captured_once")

LORA, FOLD, DORA = "lora(rank = 3)  strategy = branch", "lora(rank = 3)  strategy = fold", "dora(rank = 3)"
MOVING = "delta_lora(rank = 3, start = 0)  update = literal"
SCALING = "method scaling() { requires in == out;  v = train zeros[in];  delta = diag(v) }\n"
SCALED = ("scaling()  strategy = branch", "scaling()  strategy = fold")
HADAMARD = "method shift() { w = train ones[out];  b = train zeros[out];  output = w * y + b }\n"
MIXED = """method mixed(rank: int = 3) {
    A = train kaiming_uniform[rank, in] shared by model;  B = train zeros[out, rank]
    g = train ones[rank];  s = train ones[1]
    delta = s * (B @ diag(g) @ A) / (1 + mean(abs(B)))
}
"""


@dataclass(frozen=True)
class Case:
    """A rule over weights of one kind of a tiny model."""

    architecture: str
    rule: str  # with {method}
    methods: tuple[str, ...] = (LORA, FOLD, DORA)
    settings: dict[str, Any] = field(default_factory=dict)
    also: str = ""
    sites: int = 1


EXPERTS = "adapt model.layers.*.mlp.experts.{{gate_up_proj,down_proj}} {{ with {method} }}"
CASES = {
    "conv1d": Case("gpt2", "adapt transformer.h.*.attn.c_attn {{ with {method} }}", (LORA, DORA), sites=2),
    "embedding": Case("bert", "adapt bert.embeddings.word_embeddings {{ with {method} }}", (LORA, FOLD, DORA, MOVING)),
    "positions": Case("gpt2", "adapt transformer.wpe {{ with {method} }}", (LORA,)),
    "tied": Case("qwen2", "adapt lm_head {{ with {method}  tie }}", (LORA, FOLD, DORA, MOVING)),
    "tied_embedding": Case("gpt2", "adapt transformer.wte {{ with {method}  tie }}", (LORA,)),
    "convolution": Case("vit", "adapt vit.embeddings.patch_embeddings.projection {{ with {method} }}",
                        (LORA, FOLD, DORA, MOVING)),
    "layer_norm": Case("bert", "adapt bert.encoder.layer.*.output.LayerNorm {{ with {method} }}", SCALED,
                       also=SCALING, sites=2),
    "rms_norm": Case("llama", "adapt model.layers.*.input_layernorm {{ with {method} }}", SCALED,
                     also=SCALING, sites=2),
    "parameter": Case("qwen3_moe", "adapt model.layers.*.mlp.gate {{ with {method} }}", (FOLD,), sites=2),
    "experts": Case("qwen3_moe", EXPERTS, (LORA, FOLD, DORA, MOVING), sites=4),
    "transposed_experts": Case("gpt_oss", EXPERTS, (LORA, FOLD, MOVING), sites=4),
    "mixed_experts": Case("qwen3_moe", "adapt model.layers.*.mlp.experts.down_proj {{ with {method} }}",
                          ("mixed()  strategy = branch", "mixed()  strategy = fold"), also=MIXED, sites=2),
}  # fmt: skip
PAIRS = [(name, method) for name, case in CASES.items() for method in case.methods]


def gpt_oss(**settings: Any) -> nn.Module:
    """A decoder whose experts are stored as [experts, in, out], with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    model: nn.Module = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=32,
            max_position_embeddings=64, initializer_range=0.2, **settings,
        )
    )  # fmt: skip
    return model.eval()


@pytest.fixture(autouse=True)
def experts_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's grouped product takes no float64; that of transformers does."""
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *given: False)


def build(architectures: Any, name: str, method: str) -> tuple[Any, Any, Any]:
    """The case's architecture, its model in float64 and the program."""
    case = CASES[name]
    architecture = architectures["qwen3_moe" if case.architecture == "gpt_oss" else case.architecture]
    model = gpt_oss() if case.architecture == "gpt_oss" else architecture.model(**case.settings)
    labels = f"{architecture.task}(labels = 3)" if "classification" in architecture.task else architecture.task
    program = surgery.parse(
        f'model "given" {{ task = {labels} }}\n{case.also}{case.rule.format(method=method)}\n'
        "step { optimizer = adamw(lr = 1e-3)  batch = 4  steps = 6  compile = off }"
    )
    return architecture, model.double(), program


def inputs_of(architecture: Any, rows: int = 4, length: int = 9) -> dict[str, Tensor]:
    """Inputs with numbers in float64."""
    given = architecture.inputs(rows, length)
    return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


def disturb(tensors: dict[str, dict[str, Tensor]]) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for site in tensors.values():
            for tensor in site.values():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor))


def effective(step: Any, site: Any, tensors: dict[str, Tensor]) -> Tensor:
    """The weight of a site by the evaluator alone, with gradient to the tensors, as the model stores it."""
    formula = instance(step.plan, site.formula)
    weight = logical(step.weights[site.parameter].detach(), site)
    value = Evaluator(lambda: weight, tensors, torch.float64, stacked=stacked(site))(formula.expression)
    stored: Tensor = stored_like(weight + value if formula.form == "delta" else value, site)
    return stored


def logits(model: nn.Module, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits with other weights, in evaluation."""
    result: Tensor = functional_call(model.eval(), weights, (), inputs).logits
    return result


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_step_is_a_plain_model_with_the_effective_weight(name: str, method: str, architectures: Any) -> None:
    architecture, model, program = build(architectures, name, method)
    inputs, before = inputs_of(architecture), copy.deepcopy(model.state_dict())
    step = surgery.compile(program, model=model, example_inputs=inputs)
    sites, tensors = step.plan.sites, step.parameters_by_site
    assert len(sites) == CASES[name].sites

    for rows, length in ((4, 9), (2, 5)):  # the start is the model
        other = inputs_of(architecture, rows, length)
        with torch.no_grad():
            torch.testing.assert_close(step.forward(**other).logits, model(**other).logits)

    disturb(tensors)
    trained = {  # the forward and its gradients
        tensor.key: tensors[site.path][tensor.name]
        for site in sites for tensor in site.tensors if tensor.role == "train"
    }  # fmt: skip
    found = step.module(**inputs, training=False)
    gradients = torch.autograd.grad(found.square().mean(), list(trained.values()))
    weights = {site.parameter: effective(step, site, tensors[site.path]) for site in sites}
    expected = logits(model, weights, inputs)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(expected, logits(model, {}, inputs))
    wanted = torch.autograd.grad(expected.square().mean(), list(trained.values()))
    for key, ours, theirs in zip(trained, gradients, wanted, strict=True):
        torch.testing.assert_close({key: ours}, {key: theirs})
    for site in sites:
        torch.testing.assert_close(stored_like(step.effective_weight(site.path), site), weights[site.parameter])

    merged = step.merge()
    assert type(merged) is type(model) and merged.state_dict().keys() == before.keys()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, step.forward(**inputs).logits)
    adapted = {name for site in sites for name in names_of(model, site.parameter)}
    for key, value in merged.state_dict().items():
        assert torch.equal(value, before[key]) != (key in adapted), key

    batch = {**inputs, "labels": architecture.labels()}
    losses = [float(step(batch).loss) for _ in range(4)]
    assert losses[-1] < losses[0], losses
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def names_of(model: nn.Module, parameter: str) -> list[str]:
    """All names of a parameter: more than one where it is tied."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return [name for name, held in named.items() if held is named[parameter]]


APPLIED = [(name, CASES[name].methods[0]) for name in CASES if name != "transposed_experts"]


@pytest.mark.parametrize(("name", "method"), [*APPLIED, ("tied", DORA), ("experts", DORA)])
def test_module_scope_is_graph_scope(name: str, method: str, architectures: Any) -> None:
    architecture, model, program = build(architectures, name, method)
    inputs = inputs_of(architecture)
    step = surgery.compile(program, model=copy.deepcopy(model), example_inputs=inputs)
    disturb(step.parameters_by_site)
    same_in_place(model, program, step, inputs)


def same_in_place(model: Any, program: surgery.Program, step: Any, inputs: dict[str, Tensor]) -> None:
    """The model adapted in place computes what the step does with the same tensors, and so does a copy of it."""
    surgery.apply(program, model)
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for site in step.plan.sites:
            for tensor in site.tensors:
                shared = f"surgery_shared.{tensor.key.replace('.', '_')}"
                named[tensor.key if tensor.key in named else shared].copy_(step.weights[tensor.key])
        expected = step.forward(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected)
        torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, expected)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == step.plan.totals.trainable


@pytest.mark.parametrize("name", ["experts", "tied"])
def test_a_weight_corrected_at_the_start_is_the_same_in_place(name: str, architectures: Any, tmp_path: Path) -> None:
    architecture, model, program = build(architectures, name, "pissa(rank = 2)")
    inputs = inputs_of(architecture)
    step = surgery.compile(program, model=model, example_inputs=inputs)
    same_in_place(copy.deepcopy(model), program, step, inputs)
    step({**inputs, "labels": architecture.labels()})
    step.save(tmp_path / "run")
    attached: Any = surgery.apply(tmp_path / "run", model)
    torch.testing.assert_close(attached(**inputs).logits, step.forward(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_grouped_product_takes_any_rank(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel wants rows of whole 16 bytes, which a rank of 3 is not."""
    monkeypatch.undo()
    torch.manual_seed(0)
    experts, ends = torch.randn(3, 16, 8, dtype=dtype), torch.tensor([2, 3, 7], dtype=torch.int32)
    base = Experts(experts, False, dtype, ends, torch.ops.aten._grouped_mm.default)
    x, owners = torch.randn(7, 8, dtype=dtype), torch.tensor([0, 0, 1, 2, 2, 2, 2])
    A = torch.randn(3, 3, 8, dtype=dtype, requires_grad=True)
    B = torch.randn(3, 16, 3, dtype=dtype, requires_grad=True)
    found = base.product(base.product(x, A, transposed=True, stack=(8, 3)), B, transposed=True, stack=(3, 16))
    narrow = torch.einsum("si,sri->sr", x.float(), A[owners].float()).to(dtype).float()
    expected = torch.einsum("sr,sor->so", narrow, B[owners].float())
    share = 1e-5 if dtype is torch.float32 else 0.02  # of the largest entry: bfloat16 has 8 bits
    ours = (found, *torch.autograd.grad(found.float().square().sum(), (A, B)))
    theirs = (expected, *torch.autograd.grad(expected.square().sum(), (A, B)))
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).detach().abs().max()) <= share * float(other.detach().abs().max())


@pytest.mark.parametrize("name", ["experts", "tied", "convolution"])
def test_a_run_is_saved_and_attached(name: str, architectures: Any, tmp_path: Path) -> None:
    architecture, model, program = build(architectures, name, MOVING)
    inputs = inputs_of(architecture)
    step = surgery.compile(program, model=model, example_inputs=inputs)
    for _ in range(3):
        step({**inputs, "labels": architecture.labels()})
    assert not torch.equal(step.weights[step.plan.sites[0].parameter], model.state_dict()[step.plan.sites[0].parameter])
    step.save(tmp_path / "run")
    expected = step.forward(**inputs).logits
    loaded = surgery.load(tmp_path / "run", model=copy.deepcopy(model))
    torch.testing.assert_close(loaded.forward(**inputs).logits, expected)
    attached: Any = surgery.apply(tmp_path / "run", copy.deepcopy(model))
    torch.testing.assert_close(attached(**inputs).logits, expected)


@pytest.mark.parametrize("name", ["embedding", "tied", "convolution", "experts", "transposed_experts"])
def test_in_half_precision_a_moved_weight_is_rounded_once(name: str, architectures: Any) -> None:
    """However W is stored: the sum of all steps, from what it was at the start."""
    architecture, model, program = build(architectures, name, MOVING)
    model.bfloat16()
    inputs = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs_of(architecture).items()
    }
    step = surgery.compile(program, model=model, example_inputs=inputs)
    for _ in range(4):
        step({**inputs, "labels": architecture.labels()})
    assert step.plan.sites
    for site in step.plan.sites:
        tensors = {tensor.name: step.weights[tensor.key].detach().double() for tensor in site.tensors}
        start, now = (
            logical(weights[site.parameter].detach().double(), site) for weights in (model.state_dict(), step.weights)
        )
        exact = start + 2.0 * (tensors["B"] @ tensors["A"] - tensors["B_start"] @ tensors["A_start"])
        assert not torch.equal(now, start)
        torch.testing.assert_close(now, exact, rtol=1.01 * 2**-8, atol=0)


@pytest.mark.parametrize("module", ["bert.encoder.layer.*.attention", "bert.embeddings.dropout", "bert.encoder"])
def test_an_output_of_any_module(module: str, architectures: Any) -> None:
    bert = architectures["bert"]
    model, inputs = bert.model().double(), bert.inputs()
    text = f"{HADAMARD}adapt {module} {{ with shift() }}\n{SMALL}"
    program = surgery.parse(text)
    step = surgery.compile(program, model=copy.deepcopy(model), example_inputs=inputs)
    torch.testing.assert_close(step.forward(**inputs).logits, model(**inputs).logits)
    disturb(step.parameters_by_site)
    expected = step.forward(**inputs).logits
    hooks = []
    for path, tensors in step.parameters_by_site.items():  # by hand
        w, b = tensors["w"], tensors["b"]

        def changed(module: nn.Module, given: Any, output: Any, w: Tensor = w, b: Tensor = b) -> Any:
            if isinstance(output, Tensor):
                return w * output + b
            if isinstance(output, tuple):
                return (w * output[0] + b, *output[1:])
            output.last_hidden_state = w * output.last_hidden_state + b
            return output

        hooks.append(model.get_submodule(path).register_forward_hook(changed))
    torch.testing.assert_close(model(**inputs).logits, expected)
    for hook in hooks:
        hook.remove()
    with pytest.raises(surgery.SurgError, match="SURG055.*no weight"):
        step.merge()
    same_in_place(model, program, step, inputs)


SMALL = "step { optimizer = adamw(lr = 1e-3)  batch = 4  steps = 6  compile = off  loss = cross_entropy }"


def test_dropout_on_tokens_drops_all_that_a_token_adds(architectures: Any) -> None:
    bert = architectures["bert"]
    model, inputs = bert.model().double(), bert.inputs()
    rule = "adapt bert.embeddings.word_embeddings { with lora(rank = 3, dropout = 0.5) }"
    step = surgery.compile(surgery.parse(f"{rule}\n{SMALL}"), model=model, example_inputs=inputs)
    disturb(step.parameters_by_site)
    (tensors,) = step.parameters_by_site.values()
    base = model.bert.embeddings.word_embeddings(inputs["input_ids"])
    (node,) = [
        node
        for node in step.module.graph.nodes
        if "add" in node.name and "word_embeddings" in str(node.meta["nn_module_stack"])
    ]
    got = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            got[n.name] = super().run_node(n)
            return got[n.name]

    Watch(step.module).run(*inputs.values(), True)
    added = got[node.name] - base
    whole = 2 * (tensors["B"] @ tensors["A"]).T[inputs["input_ids"]]
    kept = added.abs().sum(-1) > 1e-12
    torch.testing.assert_close(added, whole * kept[..., None])
    assert 0 < int(kept.sum()) < kept.numel()


def test_a_norm_that_is_no_diagonal_any_more_does_not_merge(architectures: Any) -> None:
    bert = architectures["bert"]
    text = (
        "method turn() { M = train zeros[out, out];  output = y + y @ M.T }\n"
        f"adapt bert.embeddings.LayerNorm {{ with turn() }}\n{SMALL}"
    )
    step = surgery.compile(surgery.parse(text), model=bert.model(), example_inputs=bert.inputs())
    step.merge()  # at the start it is one still
    disturb({path: dict(tensors) for path, tensors in step.parameters_by_site.items()})
    with pytest.raises(surgery.SurgError, match="SURG055.*no diagonal matrix"):
        step.merge()


@pytest.mark.parametrize(("rule", "code"), [
    ("adapt first { with lora(rank = 2) }", "SURG025.*2 groups"),
    ("adapt second { with lora(rank = 2) }", "SURG025.*max_norm"),
])  # fmt: skip
def test_what_has_no_one_matrix_is_refused(rule: str, code: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 4, 1, groups=2)
            self.second = nn.Embedding(5, 4, max_norm=1.0)

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.first(self.second(ids).transpose(-1, -2).unsqueeze(-1))
            return found.flatten(1)

    program = surgery.parse(f"{rule}\nstep {{ loss = output }}")
    with pytest.raises(surgery.SurgError, match=code):
        surgery.compile(program, model=Odd(), example_inputs={"ids": torch.randint(0, 5, (3, 6))})
