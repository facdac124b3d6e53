"""Golden files: outputs that are kept as text beside the tests, so that a change of them is read as a difference."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `architecture` runs once for each of them."""
    if "architecture" in metafunc.fixturenames:
        found = _models().ARCHITECTURES
        metafunc.parametrize("architecture", list(found.values()), ids=list(found))
