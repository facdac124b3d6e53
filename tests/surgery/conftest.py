"""The cases of the behaviour matrix: every method of the library on a perceptron, an encoder and a GPT-2.

Nothing here knows a method. Where one is put is read off the spec that uses it: its rules are written anew with small
arguments, and laid over a small model. What a method cannot be laid over (a matrix that is not square, a size that its
blocks do not divide) is refused by the compiler, and the next shape is taken.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import surgery
from surgery.compiler import nodes, p1_parse, p5_capture
from surgery.compiler.library import library
from surgery.compiler.printer import show
from surgery.compiler.source import read

HERE = Path(__file__).resolve().parent
SPECS = HERE.parent.parent / "specs"
KINDS = ("mlp", "encoder", "gpt2")
RATE = 0.05
# Small numbers for parameters by their names; any other parameter keeps its default.
ARGUMENTS = {
    "rank": "3", "groups": "3", "k": "3", "block": "3", "factor": "3", "outer": "5", "bottleneck": "5", "second": "2",
    "frequencies": "20", "dropout": "0", "start": "1",
}  # fmt: skip
SHAPES = {  # of the perceptron, the first that a method admits
    "odd": (7, 13),
    "odd and square": (9, 9),
    "divisible": (12, 24),
    "divisible and square": (12, 12),
}
# What a shape may be refused for: no such path, no weight of that kind, sizes that do not fit.
REFUSALS = {"SURG005", "SURG020", "SURG025", "SURG026", "SURG027", "SURG028"}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40, "max_position_embeddings": 24}
BERT = {"model_type": "bert", **SMALL, "hidden_size": 24, "intermediate_size": 36, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2, "num_labels": 3}  # fmt: skip
LLAMA = {"model_type": "llama", **SMALL, "hidden_size": 24, "intermediate_size": 36, "num_key_value_heads": 2,
         "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
ENCODERS = (BERT, LLAMA, {**LLAMA, "num_key_value_heads": 4})  # the first whose modules a spec's patterns find
GPT2 = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 24, "n_inner": 36,
        "vocab_size": 40, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
# Patterns for a model that a spec does not name; the first that a method admits.
PATTERNS = {
    "mlp": ("blocks.*.{up,down}", "blocks.*.up", "blocks.*.norm"),
    "gpt2": ("transformer.h.*.{attn,mlp}.c_*", "transformer.h.*.attn.c_proj", "transformer.h.*.ln_*"),
}


class Block(nn.Module):
    """Up, an activation, down and a norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(inputs, outputs), nn.Linear(outputs, inputs, bias=False)
        self.norm = nn.LayerNorm(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs]` to the same."""
        found: Tensor = self.norm(x + self.down(torch.tanh(self.up(x))))
        return found


class Perceptron(nn.Module):
    """Two blocks, a parameter that no method touches, and a head of three classes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(inputs, outputs), Block(inputs, outputs)])
        self.scale = nn.Parameter(torch.full((inputs,), 1.5))
        self.head = nn.Linear(inputs, 3)
        self.config = SimpleNamespace(num_attention_heads=3, hidden_size=inputs)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[batch, 3]` from features `[batch, inputs]`."""
        for block in self.blocks:
            features = block(features)
        logits: Tensor = self.head(features * self.scale)
        return logits


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in float64 of which no parameter is a constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@functools.cache
def references() -> Mapping[str, Callable[..., Any]]:
    """Every function of the files in `references/` by its name."""
    found: dict[str, Callable[..., Any]] = {}
    for path in sorted((HERE / "references").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"references_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_"):
                assert name not in found, f"two references of {name}"
                found[name] = value
    return found


@functools.cache
def rules_of(method: str) -> tuple[nodes.Adapt, ...]:
    """The rules of the spec that shows a method: the one of its name, else the first that uses it."""
    for path in [SPECS / f"{method}.surg", *sorted(SPECS.glob("*.surg"))]:
        if not path.exists():
            continue
        rules = tuple(item for item in p1_parse.run(read(path)).items if isinstance(item, nodes.Adapt))
        if any(isinstance(found := _with(rule).value, nodes.Call) and found.function == method for rule in rules):
            return rules
    pytest.fail(f"no spec in specs/ uses {method}")


def _with(rule: nodes.Adapt) -> nodes.With:
    return next(clause for clause in rule.clauses if isinstance(clause, nodes.With))


def small(rule: nodes.Adapt, folder: Path, pattern: str | None = None) -> str:
    """A rule with small arguments; `pattern` replaces its own and everything that narrows it.

    A text that has to be given names a checkpoint: a folder of its name in `folder`.
    """
    call = _with(rule).value
    assert isinstance(call, nodes.Call)
    given = {argument.name: argument for argument in call.arguments}
    arguments = []
    for parameter in library()[call.function].parameters:
        if parameter.name in ARGUMENTS and parameter.kind in ("int", "real"):
            arguments.append(nodes.Argument(nodes.Number(ARGUMENTS[parameter.name]), parameter.name))
        elif parameter.kind == "text" and parameter.default is None:
            arguments.append(nodes.Argument(nodes.String(str(folder / parameter.name)), parameter.name))
        elif parameter.default is None:
            arguments.append(given[parameter.name])
    clauses = [clause for clause in rule.clauses if isinstance(clause, nodes.Setting) and clause.name == "update"]
    made = replace(rule, clauses=(nodes.With(nodes.Call(call.function, tuple(arguments))), *clauses))
    if pattern is not None:
        made = replace(made, pattern=nodes.Pattern(pattern), classes=(), where=None, exceptions=())
    return show(replace(made, comments=()))


@dataclass
class Reference:
    """A model in float64 with every adapted site computed by the reference of its method; differentiable."""

    step: Any
    model: Any
    start: Mapping[str, Tensor]
    trained: dict[str, Tensor] = field(default_factory=dict)  # leaves by key
    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # by path: what a reference is given

    def __post_init__(self) -> None:
        plan, leaves = self.step.plan, dict[str, Tensor]()
        for number, site in enumerate(plan.sites):
            for tensor in site.tensors:
                value = self.step.parameters_by_site[site.path][tensor.name].detach().clone()
                value = value.double() if value.is_floating_point() else value
                leaf = leaves.setdefault(tensor.key, value.requires_grad_(tensor.role == "train"))
                if tensor.role == "train":
                    self.trained[tensor.key] = leaf
            name = plan.formulas[site.formula].method
            assert name in references(), f"tests/surgery/references has no function `{name}`"
            stored = self.model.get_parameter(site.parameter).detach()
            self.records[site.path] = {
                "t": {tensor.name: leaves[tensor.key] for tensor in site.tensors},
                "W": stored.T if site.module_class == "Conv1D" else stored,
                "p": {**plan.formulas[site.formula].arguments, **self._place(site, number)},
                "of": references()[name],
            }

    def _place(self, site: Any, number: int) -> dict[str, Any]:
        """Where a site stands, counted here once more."""
        sites, config = self.step.plan.sites, self.model.config
        block, kind = block_and_kind(site.path)
        blocks = sorted({block_and_kind(other.path)[0] for other in sites})
        kinds = list(dict.fromkeys(block_and_kind(other.path)[1] for other in sites))
        heads = config.num_attention_heads
        few = getattr(config, "num_key_value_heads", heads) if kind.endswith(("k_proj", "v_proj")) else heads
        same = [other.path for other in sites if block_and_kind(other.path)[1] == kind]
        return {
            "layer": blocks.index(block), "layers": len(blocks), "slot": kinds.index(kind), "slots": len(kinds),
            "site": number, "sites": len(sites), "heads": few, "max_heads": heads,
            "head_dim": config.hidden_size // heads,
            "max_in": max(other.shape[1] for other in sites), "max_out": max(other.shape[0] for other in sites),
            "start": {tensor.name: self.start[tensor.key] for tensor in site.tensors},
            "weight_of": functools.partial(_stored, site),
            "earlier": [self.records[path] for path in reversed(same[: same.index(site.path)])],
        }  # fmt: skip

    def _result(self, path: str) -> Any:
        record = self.records[path]
        return record["of"](record["W"], record["t"], record["p"])

    def weight(self, path: str) -> tuple[Tensor, Tensor | None] | None:
        """The effective weight and bias of a site; None where the plan says that it has none."""
        site = next(site for site in self.step.plan.sites if site.path == path)
        result, bias = self._result(path), getattr(self.model.get_submodule(path), "bias", None)
        if isinstance(result, Tensor):
            weight = torch.diag(result) if result.dim() == 1 else result  # a norm's is a vector
            return weight.detach(), None if bias is None else bias.detach()
        if not site.facts.merges or site.module_class not in ("Linear", "Conv1D"):
            return None
        W = self.records[path]["W"]
        zero = torch.zeros(1, W.shape[1], dtype=W.dtype)
        base = torch.zeros(W.shape[0], dtype=W.dtype) if bias is None else bias.detach()
        constant = result(zero, base[None])[0].detach()
        eye = torch.eye(W.shape[1], dtype=W.dtype)
        weight = (result(eye, eye @ W.T + base).detach() - constant).T
        return weight, None if bias is None and not constant.any() else constant

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The logits."""
        hooks = [
            self.model.get_submodule(path).register_forward_hook(functools.partial(self._hook, path))
            for path in self.records
        ]
        try:
            return logits_of(self.model(**inputs))
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        record = self.records[path]
        record["x"] = args[0] if args else None
        result = self._result(path)
        if isinstance(result, Tensor) and result.dim() == 1:  # a norm's
            assert isinstance(module, nn.LayerNorm)
            return F.layer_norm(args[0], result.shape, result, module.bias, module.eps)
        if isinstance(result, Tensor):
            return F.linear(args[0], result, getattr(module, "bias", None))
        return result(args[0], output)


def _stored(site: Any, folder: str) -> Tensor:
    """A site's W in another checkpoint."""
    found = load_file(Path(folder) / "model.safetensors")[site.parameter]
    return found.T if site.module_class == "Conv1D" else found


def block_and_kind(path: str) -> tuple[int, str]:
    """The first number in a path, and what stands below it."""
    parts = path.split(".")
    index = next(index for index, part in enumerate(parts) if part.isdigit())
    return int(parts[index]), ".".join(parts[index + 1 :])


def like(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch in the model's dtype."""
    dtype = next(model.parameters()).dtype
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def is_causal(model: nn.Module) -> bool:
    """Whether the model predicts the next token."""
    return type(model).__name__.endswith(("CausalLM", "LMHeadModel"))


def logits_of(output: Any) -> Tensor:
    """The logits of a model that returns a tensor, or of one that returns a structure."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


@dataclass
class Case:
    """One method on one model: a compiled step, and what a test needs of both."""

    method: str
    kind: str
    index: int  # of the model among those of its kind
    model: Any
    program: str

    def __post_init__(self) -> None:
        self.text = show(nodes.Tree((library()[self.method],)))
        self.step = self.compile(self.model)
        self.start = self.snapshot()
        self.start_tensors = {key: tensor.detach().clone() for key, tensor in self.tensors().items()}

    def compile(self, model: nn.Module, strategy: str | None = None) -> Any:
        """A step of the program on a model, with calibration data where the plan asks for it."""
        text = self.program if strategy is None else self.program.replace("with ", f"strategy = {strategy}  with ")
        if next(model.parameters()).dtype is torch.bfloat16:  # where updates in place are refused
            text = text.replace("update = literal", "")
        program = surgery.parse(text)
        calibration = None
        if any(site.facts.needs_calibration for site in surgery.plan(program, model).sites):
            calibration = [like(model, self.batch(seed)) for seed in (20, 21)]
        return surgery.compile(program, model=model, example_inputs=like(model, self.inputs()), calibration=calibration)

    def batch(self, seed: int = 1, rows: int = 4) -> dict[str, Tensor]:
        """A batch with labels."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 3, (rows,), generator=generator)
        if self.kind == "mlp":
            width = self.model.head.in_features
            return {"features": torch.randn(rows, width, generator=generator, dtype=torch.float64), "labels": labels}
        ids = torch.randint(3, 40, (rows, 9), generator=generator)
        if is_causal(self.model):
            return {"input_ids": ids, "labels": ids.clone()}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def inputs(self, rows: int = 4, seed: int = 1) -> dict[str, Tensor]:
        """A batch without its labels."""
        return {name: tensor for name, tensor in self.batch(seed, rows).items() if name != "labels"}

    def loss(self, logits: Tensor) -> Tensor:
        """The mean cross-entropy of the task on `batch()`, written out."""
        labels = self.batch()["labels"]
        if is_causal(self.model):
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return F.cross_entropy(logits, labels)

    def base(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The logits of the model as it was given."""
        with torch.no_grad():
            return logits_of(self.model(**inputs))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The logits of the step."""
        with torch.no_grad():
            return logits_of(self.step.forward(**inputs))

    def tensors(self, role: str | None = None) -> dict[str, Tensor]:
        """The step's tensors of the method by key, each shared one once."""
        return {
            tensor.key: self.step.parameters_by_site[site.path][tensor.name]
            for site in self.step.plan.sites
            for tensor in site.tensors
            if role in (None, tensor.role)
        }

    def base_weights(self) -> dict[str, Tensor]:
        """The step's copy of the model's parameters."""
        names = [name for name, _ in self.model.named_parameters()]
        return {name: self.step.weights[name] for name in names if name in self.step.weights}

    def disturb(self) -> None:
        """Move every trained tensor of the method off its start."""
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for tensor in self.tensors(role="train").values():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))

    def reference(self) -> Reference:
        """The independent computation, at the step's present tensors."""
        return Reference(self.step, self.model, self.start_tensors)

    def snapshot(self) -> dict[str, Any]:
        """The step's whole state, which nothing writes into."""
        state: dict[str, Any] = copy.deepcopy(self.step.state_dict())
        return state

    def reset(self) -> None:
        """Back to the start."""
        self.step.load_state_dict(copy.deepcopy(self.start))


def save_other(model: nn.Module, folder: Path) -> None:
    """Another checkpoint of a model: every parameter moved a little, in a way of the folder's name."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(len(folder.name))
    moved = {
        name: tensor.detach() + 0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in model.named_parameters()
    }
    save_file({name: tensor.contiguous() for name, tensor in moved.items()}, folder / "model.safetensors")


def build(method: str, kind: str, folder: Path) -> Case:
    """The first shape and pattern that the compiler admits; what it says of the last one is the failure."""
    rules = rules_of(method)
    own = next(rule for rule in rules if getattr(_with(rule).value, "function", None) == method)
    texts = [[small(rule, folder) for rule in rules]]
    if kind in PATTERNS:
        texts = [[small(own, folder, pattern)] for pattern in PATTERNS[kind]]
    refused = None
    for rule_texts, index in itertools.product(texts, range(len(MODELS[kind]))):
        model = model_of(kind, index)
        loss = "causal_lm" if is_causal(model) else "cross_entropy"
        step = f"optimizer = sgd(lr = {RATE}, momentum = 0.9)  batch = 4  steps = 6  seed = 3  compile = off"
        program = "\n".join([*rule_texts, f"step {{ {step}  loss = {loss} }}"])
        try:
            surgery.plan(surgery.parse(program), model)
        except surgery.SurgError as error:
            assert {found.code for found in error.diagnostics} <= REFUSALS, error
            refused = error
            continue
        for parameter in library()[method].parameters:
            if parameter.kind == "text" and parameter.default is None:
                save_other(model, folder / parameter.name)
        return Case(method, kind, index, model, program)
    raise AssertionError(f"no shape admits {method}") from refused


def transformer(settings: Mapping[str, Any]) -> nn.Module:
    """A small model of a transformers architecture that computes all in its weights' dtype."""
    config = AutoConfig.for_model(**settings)
    model: nn.Module
    if config.model_type == "bert":
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):  # transformers' own computes in float32
            model.set_submodule(path, nn.RMSNorm(config.hidden_size, config.rms_norm_eps))
    return model


MODELS: dict[str, list[Callable[[], nn.Module]]] = {
    "mlp": [functools.partial(Perceptron, *shape) for shape in SHAPES.values()],
    "encoder": [functools.partial(transformer, settings) for settings in ENCODERS],
    "gpt2": [functools.partial(transformer, GPT2)],
}


@functools.cache
def model_of(kind: str, index: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model that all cases share: nothing that surgery does changes the model that it is given."""
    model = seeded(MODELS[kind][index]).to(dtype)
    SHARED[id(model)] = model
    return model


SHARED: dict[int, nn.Module] = {}
_GRAPHS: dict[tuple[int, str | None], Any] = {}


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    method, kind = request.param
    run = p5_capture.run

    def once(model: nn.Module, examples: dict[str, Tensor], task: str | None) -> Any:
        """The graph of a shared model: no pass changes what it is given, so one serves all methods."""
        if id(model) not in SHARED:
            return run(model, examples, task)
        if (id(model), task) not in _GRAPHS:
            _GRAPHS[id(model), task] = run(model, examples, task)
        return _GRAPHS[id(model), task]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p5_capture, "run", once)
        yield build(method, kind, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def case(built: Case) -> Iterator[Case]:
    """The compiled case, at its start."""
    built.reset()
    yield built


@pytest.fixture
def mlp(case: Case) -> Case:
    """The case, for tests that run on the smallest kind of model alone."""
    return case


@pytest.fixture
def half(built: Case) -> tuple[Tensor, Tensor]:
    """Logits of the case in bfloat16, and of the reference in float64 from the same rounded weights."""
    built.reset()
    built.disturb()
    model = model_of(built.kind, built.index, torch.bfloat16)
    step, inputs = built.compile(model), like(model, built.inputs())
    start = {}
    with torch.no_grad():
        for site in step.plan.sites:
            for tensor in site.tensors:
                found = step.parameters_by_site[site.path][tensor.name]
                start[tensor.key] = found.detach().clone().double()
                if tensor.role == "train":
                    found.copy_(built.step.parameters_by_site[site.path][tensor.name])
        rounded = copy.deepcopy(model).double()
        expected = Reference(step, rounded, start)(like(rounded, inputs))
        return logits_of(step.forward(**inputs)).double(), expected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of the matrix runs for every method on every kind of model; with `mlp` or `half` on the smallest alone."""
    if "built" in metafunc.fixturenames:
        kinds = KINDS[:1] if {"mlp", "half"} & set(metafunc.fixturenames) else KINDS
        cases = [(method, kind) for method in library() for kind in kinds]
        metafunc.parametrize("built", cases, indirect=True, ids=["-".join(case) for case in cases], scope="module")
