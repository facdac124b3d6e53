"""The wheel holds everything and gives site-packages one name."""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREE = ["compiler", "grammar", "surgery", "specs", "tests", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """File names in an sdist of a copy of the tree, and in the wheel that is built from that sdist."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is the build backend and is not installed here")
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    tree.mkdir()
    for name in TREE:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree / name)
    sdist = tree / "dist" / build(tree, "build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
        sources = {name.partition("/")[2] for name in archive.getnames()}
    unpacked = next((folder / "unpacked").iterdir())
    with zipfile.ZipFile(unpacked / "dist" / build(unpacked, "build_wheel")) as wheel:
        return sources, set(wheel.namelist())


def build(tree: Path, hook: str) -> str:
    """Call a hook of the build backend in the tree, without isolation and so without a network."""
    code = f"import setuptools.build_meta as backend; print(backend.{hook}('dist'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]


def test_the_wheel_has_one_top_level_name(archives: tuple[set[str], set[str]]) -> None:
    tops = {name.split("/")[0] for name in archives[1]}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"surgery"}


def test_the_wheel_holds_every_source_and_data_file(archives: tuple[set[str], set[str]]) -> None:
    expected = {"surgery/py.typed"}
    for top, prefix in (("surgery", ""), ("compiler", "surgery/"), ("grammar", "surgery/")):
        for pattern in ("*.py", "*.surg", "*.lark", "*.jinja", "codes/*.md"):
            for path in (ROOT / top).rglob(pattern):
                inside = path.relative_to(ROOT)
                if not (inside.parts[0] == "surgery" and inside.parts[1] in {"compiler", "grammar"}):
                    expected.add(prefix + inside.as_posix())
    assert expected - archives[1] == set()


def test_the_sdist_holds_specs_and_tests(archives: tuple[set[str], set[str]]) -> None:
    assert {"specs/demo.surg", "tests/test_packaging.py", "compiler/span.py", "grammar/__init__.py"} <= archives[0]


def test_the_wheel_names_the_command_and_the_licence(archives: tuple[set[str], set[str]]) -> None:
    information = {name.partition("/")[2] for name in archives[1] if ".dist-info/" in name}
    assert {"entry_points.txt", "licenses/LICENSE"} <= information
