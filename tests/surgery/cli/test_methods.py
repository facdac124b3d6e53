"""`surgery methods` and the pages of the library that it writes."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

import surgery
from surgery.cli import methods
from surgery.cli.method_pages import pages
from tests.command_line import succeed

ROOT = Path(__file__).parents[3]
PAGES = ROOT / "docs" / "methods"
FOUND = {method.name: method for method in surgery.methods()}


def test_the_pages_are_those_of_the_library() -> None:
    expected = pages(list(FOUND.values()), PAGES, ROOT / "specs")
    assert {path.name for path in PAGES.iterdir()} == set(expected), "renew them: make docs"
    for name, text in expected.items():
        assert (PAGES / name).read_text() == text, f"docs/methods/{name} is stale: make docs"


def test_pages_are_written_and_those_of_methods_that_are_gone_go(tmp_path: Path) -> None:
    (tmp_path / "gone.md").write_text("# gone\n")
    succeed("methods", "--write", str(tmp_path), "--specs", str(ROOT / "specs"))
    assert {path.stem for path in tmp_path.iterdir()} == {"README", *FOUND}
    assert "surg\nmethod lora(" in (tmp_path / "lora.md").read_text()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(methods, "output", lambda: Console(file=text, width=width))
    methods._print_all(list(FOUND.values()))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    first_words = {line.split()[0].rstrip(":") for line in lines if line and line[0] != " "}
    assert set(FOUND) <= first_words, "a name is cut"


@pytest.mark.parametrize("name", FOUND)
def test_a_header_says_name_source_and_place(name: str) -> None:
    assert re.fullmatch(r"[^:]+: .+\. .+ (19|20)\d\d, (arXiv:\d{4}\.\d{5}|openreview:\w+).*\.", FOUND[name].source)
    assert len(FOUND[name].what) <= 100


def test_the_numbers_of_a_known_method() -> None:
    assert FOUND["lora"].trained == 8 * (4096 + 4096)
