"""Golden files: outputs that are kept as text beside the tests, so that a change of them is read as a difference."""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

from surgery.compiler import p5_capture
from surgery.compiler.examples import example_inputs
from surgery.compiler.graph import Graph, tensors

FOLDER = Path(__file__).resolve().parent
Golden = Callable[[str, str], None]

# Few examples, the same ones in every run: the suite is fast, and what fails once fails again.
settings.register_profile("suite", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(text, "golden/demo/p1.txt")`: the text equals the file below tests/; a missing file fails."""
    update = bool(request.config.getoption("--update-golden"))

    def compare(text: str, name: str) -> None:
        path = FOLDER / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            return
        if not path.exists():
            pytest.fail(f"{name} is missing; pytest --update-golden writes it")
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            lines = difflib.unified_diff(expected.splitlines(), text.splitlines(), name, "now", lineterm="")
            pytest.fail("\n".join([*lines, "pytest --update-golden accepts this"]), pytrace=False)

    return compare


def _models() -> ModuleType:
    # tests/ is no package and not on the path: the file is loaded by its place, once.
    if "surgery_test_models" not in sys.modules:
        spec = importlib.util.spec_from_file_location("surgery_test_models", FOLDER / "models.py")
        assert spec is not None and spec.loader is not None
        sys.modules["surgery_test_models"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["surgery_test_models"]


@pytest.fixture
def architectures() -> Any:
    """Name -> Architecture (tests/models.py): `architectures["llama"].model(dropout=0.1)`."""
    return _models().ARCHITECTURES


_GRAPHS: dict[Any, Any] = {}


@pytest.fixture(scope="module")
def captured_once() -> Iterator[None]:
    """Equal models are captured once: no pass changes the graph it is given, so one serves all tests of a process.

    Capturing takes nine tenths of the time in which a tiny model is compiled.
    """
    run = p5_capture.run

    def once(model: nn.Module, examples: dict[str, Tensor], task: str | None) -> Any:
        shapes = tuple((name, value.shape, value.dtype) for name, value in examples.items())
        key = (_contents(model), shapes, task)
        if key not in _GRAPHS:
            own = copy.deepcopy(model)  # which no test can change; it is kept, so that the ids in the key stay taken
            _GRAPHS[key] = (own, run(own, examples, task))
        return _GRAPHS[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p5_capture, "run", once)
        yield


def _contents(model: nn.Module) -> tuple[Any, ...]:
    """What two models have in common that compute the same: classes, settings, ties and all numbers."""
    config: Any = getattr(model, "config", None)
    settings = config.to_json_string() if hasattr(config, "to_json_string") else repr(config)
    digest, first = hashlib.sha256(), dict[int, str]()
    for name, tensor in tensors(model).items():
        digest.update(f"{name} {first.setdefault(id(tensor), name)} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return (*(type(module) for module in model.modules()), repr(model), settings, digest.hexdigest())


@functools.cache
def _captured(architecture: Any) -> tuple[nn.Module, Graph]:
    """The model, with dropout, and its graph; capturing leaves model, modes and torch's generator as they are."""
    # In transformers 5.17 OPT draws a number in every layer, which the graph has no use for.
    model = architecture.model(dropout=0.0 if architecture.name == "opt" else 0.3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config, modes = model.config.to_dict(), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    graph = p5_capture.run(model, example_inputs(model, architecture.task), architecture.task)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config.to_dict() == config and [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    return model, graph


@pytest.fixture
def captured() -> Callable[[Any], tuple[nn.Module, Graph]]:
    """`captured(architecture)`: its tiny model and the graph of it, made once in a process; no test changes either."""
    return _captured


@pytest.fixture
def partitioned_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch compiles is decomposed, and cut into what is kept and what is had again, but its kernels are torch's.

    Generating kernels takes most of the time of compiling, and changes nothing of what is kept.
    """
    torch._dynamo.reset()
    partition = lookup_backend("aot_eager_decomp_partition")
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs: partition(graph, inputs))
    yield
    torch._dynamo.reset()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `architecture` runs once for each of them."""
    if "architecture" in metafunc.fixturenames:
        found = _models().ARCHITECTURES
        metafunc.parametrize("architecture", list(found.values()), ids=list(found))
