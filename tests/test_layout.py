"""The rules of the house that a reader relies on: where things are, how long they are, what is documented."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # lines of a Python file; 300 is a smell
HEADINGS = ["## What", "## Why", "## Example", "## Fix"]
IGNORED = {".venv", ".git", "build", "dist", "__pycache__", "runs", "golden"}


def sources(*folders: str) -> list[Path]:
    """The Python files below the folders, without following the links inside `surgery`."""
    found: list[Path] = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT).parts
            if not IGNORED & set(inside) and not (inside[0] == "surgery" and inside[1] in {"compiler", "grammar"}):
                found.append(path)
    return found


def tracked() -> list[Path]:
    """The files of the repository, or of the folder where there is no repository."""
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        folders = [path for path in ROOT.iterdir() if path.name not in IGNORED]
        return [path for top in folders for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]


def test_the_listing_of_the_compiler_is_the_pipeline() -> None:
    from surgery.compiler.pipeline import PASSES

    files = sorted((ROOT / "compiler").glob("p[0-9]*.py"), key=lambda path: int(path.stem[1:].split("_")[0]))
    assert [path.stem for path in files] == [module.__name__.rpartition(".")[2] for module in PASSES]
    assert len((ROOT / "compiler" / "pipeline.py").read_text().splitlines()) <= 60


def test_packages_in_pyproject_match_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in sources("surgery", "compiler", "grammar") if path.name == "__init__.py"}
    names = [".".join(folder.relative_to(ROOT).parts) for folder in folders]
    expected = sorted(name if name.split(".")[0] == "surgery" else f"surgery.{name}" for name in names)
    assert sorted(listed) == expected


def test_every_folder_with_python_is_a_package() -> None:
    for path in sources("surgery", "compiler", "grammar"):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"


@pytest.mark.parametrize("link", ["compiler", "grammar"])
def test_links_point_to_the_folders(link: str) -> None:
    path = ROOT / "surgery" / link
    if not path.exists():  # a wheel's or an sdist's tree
        pytest.skip("links exist in a checkout only")
    assert path.is_symlink() and path.resolve() == ROOT / link


def test_the_folders_are_not_importable_by_their_own_names() -> None:
    for name in ("compiler", "grammar"):
        run = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
        assert f"import surgery.{name}, not {name}" in run.stderr


def test_no_init_files_under_tests() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))  # pytest would import tests/compiler as `compiler`


def test_no_file_is_too_long() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources("surgery", "compiler", "grammar", "tests", "specs")
        if (count := len(path.read_text().splitlines())) > LIMIT
    }
    assert not long


def test_every_code_in_use_has_a_page() -> None:
    used: set[str] = set()
    for path in sources("surgery", "compiler", "grammar"):
        used |= set(re.findall(r'"(SURG\d{3})"', path.read_text()))
    pages = {path.stem for path in (ROOT / "compiler" / "codes").glob("SURG*.md")}
    assert used - pages == set(), "codes without a page in compiler/codes"
    assert pages - used == set(), "pages of codes that nothing gives"


@pytest.mark.parametrize("page", sorted((ROOT / "compiler" / "codes").glob("*.md")), ids=lambda path: path.stem)
def test_pages_of_codes_have_their_headings(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert re.fullmatch(rf"# {page.stem}: \S.*", lines[0])
    assert [line for line in lines if line.startswith("## ")] == HEADINGS


def test_no_local_paths_or_registries() -> None:
    # Spelt in pieces, so that this file does not match itself.
    forbidden = re.compile("|".join(["/wo" + "rk/", "/ro" + "ot/", "file:" + "///", "/opt/wh" + "eels"]))
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # data and archives
        assert not forbidden.search(text), f"{path.relative_to(ROOT)} mentions a path of one machine"


def test_everything_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+(; python_version < "3\.14")?', line) for line in lines)
    assert "torch==2.13.0" in lines
