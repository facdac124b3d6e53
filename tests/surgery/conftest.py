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
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import surgery
from surgery.compiler import nodes, p1_parse
from surgery.compiler.algebra.compose import calls
from surgery.compiler.algebra.names import MEASURED
from surgery.compiler.events import programs
from surgery.compiler.library import library
from surgery.compiler.printer import show
from surgery.compiler.source import read
from surgery.runtime.measure import FEW
from surgery.runtime.ownership import written_names

HERE = Path(__file__).resolve().parent
SPECS = HERE.parent.parent / "specs"


def _load(name: str) -> Any:
    """A file beside this one: tests/ is no package and not on the path."""
    spec = importlib.util.spec_from_file_location(f"surgery_tests_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models, reference = _load("small_models"), _load("reference")
KINDS = ("mlp", "encoder", "gpt2")
RATE = 0.05
# Small numbers for parameters by their names; any other parameter keeps its default.
ARGUMENTS = {
    "rank": "3", "groups": "3", "k": "3", "block": "3", "factor": "3", "outer": "5", "bottleneck": "5", "second": "2",
    "frequencies": "20", "dropout": "0", "start": "1", "alpha": "6", "target": "2", "warmup": "1", "cooldown": "2",
    "interval": "2", "period": "4", "width": "4",
}  # fmt: skip
# What a shape may be refused for: no such path, no weight of that kind, sizes that do not fit.
REFUSALS = {"SURG005", "SURG020", "SURG025", "SURG026", "SURG027", "SURG028"}
# Patterns for a model that a spec does not name; the first that a method admits.
PATTERNS = {
    "mlp": ("blocks.*.{up,down}", "blocks.*.up", "blocks.*.norm"),
    "gpt2": ("transformer.h.*.{attn,mlp}.c_*", "transformer.h.*.attn.c_proj", "transformer.h.*.ln_*"),
}


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


def _reads_data(node: nodes.Expr) -> bool:
    return any(call.function in MEASURED for call in calls(node))


def small(rule: nodes.Adapt, folder: Path, pattern: str | None = None) -> str:
    """A rule with small arguments; `pattern` replaces its own and everything that narrows it.

    A text that has to be given names a checkpoint: a folder of its name in `folder`.
    """
    call = _with(rule).value
    assert isinstance(call, nodes.Call)
    given = {argument.name: argument for argument in call.arguments}
    arguments = []
    for parameter in library()[call.function].parameters:
        if parameter.default is not None and _reads_data(parameter.default):
            continue  # measured on the calibration rows
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
        measured = None
        if next(model.parameters()).dtype is torch.bfloat16:  # where updates in place are refused
            text = text.replace("update = literal", "")
            measured = self.step.plan.measured  # fewer digits may give a block another number
        program, calibration = surgery.parse(text), None
        draft = surgery.plan(program, model, numbers="draft")
        if draft.measured or any(site.facts.needs_calibration for site in draft.sites):
            rows = FEW // 2 if draft.measured else 4
            calibration = [models.like(model, self.batch(seed, rows)) for seed in (20, 21)]
        inputs = models.like(model, self.inputs())
        return surgery.api._compile(program, model, inputs, None, calibration, measured=measured, allow_code=False)

    def batch(self, seed: int = 1, rows: int = 4) -> dict[str, Tensor]:
        """A batch with labels."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 3, (rows,), generator=generator)
        if self.kind == "mlp":
            width = self.model.head.in_features
            return {"features": torch.randn(rows, width, generator=generator, dtype=torch.float64), "labels": labels}
        ids = torch.randint(3, 40, (rows, 9), generator=generator)
        if models.is_causal(self.model):
            return {"input_ids": ids, "labels": ids.clone()}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def inputs(self, rows: int = 4, seed: int = 1) -> dict[str, Tensor]:
        """A batch without its labels."""
        return {name: tensor for name, tensor in self.batch(seed, rows).items() if name != "labels"}

    def loss(self, logits: Tensor) -> Tensor:
        """The mean cross-entropy of the task on `batch()`, written out."""
        labels = self.batch()["labels"]
        if models.is_causal(self.model):
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return F.cross_entropy(logits, labels)

    def base(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The logits of the model as it was given."""
        with torch.no_grad():
            found: Tensor = reference.logits_of(self.model(**inputs))
        return found

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The logits of the step."""
        with torch.no_grad():
            found: Tensor = reference.logits_of(self.step.forward(**inputs))
        return found

    def tensors(self, role: str | None = None) -> dict[str, Tensor]:
        """The step's tensors of the method by key, each shared one once."""
        return {
            tensor.key: self.step.parameters_by_site[site.path][tensor.name]
            for site in self.step.plan.sites
            for tensor in site.tensors
            if role in (None, tensor.role)
        }

    def assigned(self, *steps: int) -> set[str]:
        """What events write in some of the 6 steps, beside the optimizer."""
        found = set[str]()
        for program in programs(self.step.plan):
            if any(eval(program.condition, {"step": step, "steps": 6}) for step in steps):
                found |= set(written_names(self.step.plan, self.step.graph, [], [program]))
        return found

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

    def reference(self) -> Any:
        """The independent computation, at the step's present tensors."""
        return reference.Reference(self.step, self.model, self.start_tensors)

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
    for rule_texts, index in itertools.product(texts, range(len(models.MODELS[kind]))):
        model = models.model_of(kind, index)
        loss = "causal_lm" if models.is_causal(model) else "cross_entropy"
        step = f"optimizer = sgd(lr = {RATE}, momentum = 0.9)  batch = 4  steps = 6  seed = 3  compile = off"
        program = "\n".join([*rule_texts, f"step {{ {step}  loss = {loss} }}"])
        try:
            surgery.plan(surgery.parse(program), model, numbers="draft")
        except surgery.SurgError as error:
            assert {found.code for found in error.diagnostics} <= REFUSALS, error
            refused = error
            continue
        for parameter in library()[method].parameters:
            if parameter.kind == "text" and parameter.default is None:
                save_other(model, folder / parameter.name)
        return Case(method, kind, index, model, program)
    raise AssertionError(f"no shape admits {method}") from refused


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, captured_once: None, tmp_path_factory: pytest.TempPathFactory) -> Case:
    method, kind = request.param
    return build(method, kind, tmp_path_factory.mktemp("checkpoint"))


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
    model = models.model_of(built.kind, built.index, torch.bfloat16)
    if any(site.update == "literal" for site in built.step.plan.sites) and "update = literal" not in built.program:
        pytest.skip("its steps move W, which is refused in bfloat16: their sum has no closed form")
    step, inputs = built.compile(model), models.like(model, built.inputs())
    start = {}
    with torch.no_grad():
        for site in step.plan.sites:
            for tensor in site.tensors:
                found = step.parameters_by_site[site.path][tensor.name]
                start[tensor.key] = found.detach().clone().double()
                if tensor.role == "train":
                    found.copy_(built.step.parameters_by_site[site.path][tensor.name])
        rounded = copy.deepcopy(model).double()
        expected = reference.Reference(step, rounded, start)(models.like(rounded, inputs))
        return reference.logits_of(step.forward(**inputs)).double(), expected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of the matrix runs for every method on every kind of model; with `mlp` or `half` on the smallest alone."""
    if "built" in metafunc.fixturenames:
        kinds = KINDS[:1] if {"mlp", "half"} & set(metafunc.fixturenames) else KINDS
        cases = [(method, kind) for method in library() for kind in kinds]
        metafunc.parametrize("built", cases, indirect=True, ids=["-".join(case) for case in cases], scope="module")
