"""Every diagnostic as people see it: the example on a page gives its code, and the rendered text is kept as a file.

`tests/errors/*.surg` are further mistakes of the same kinds; `SURGnnn_what.surg` gives that code, and no other.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import surgery

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "compiler" / "codes").glob("SURG*.md"))
WRONG = sorted((ROOT / "tests" / "errors").glob("*.surg"))
SYNTAX = ("SURG001_", "SURG010_")  # tests/compiler/test_parse.py takes these
DECADES = {0, 2, 3}  # codes of text, model and plan; the others need a run, and are tested where they arise
LATER = {"SURG036", "SURG037", "SURG041", "SURG060"}  # found after the plan, but by a spec alone
Golden = Callable[[str, str], None]


def example(page: Path) -> str:
    """The `.surg` block under a page's heading `## Example`."""
    found = re.search(r"^## Example$.*?^```surg\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page.name} shows no .surg example"
    return found.group(1)


def by_spec(page: Path) -> bool:
    """Whether a spec alone gives the code."""
    number = int(page.stem.removeprefix("SURG"))
    return page.stem in LATER or (number // 10 in DECADES and "```surg" in page.read_text())


def failure(name: str, text: str, folder: Path) -> surgery.SurgError:
    """What the spec gives when it is read, planned and, where that is too early, compiled or applied."""
    shutil.copytree(ROOT / "specs" / "configs", folder / "configs")
    path = folder / f"{name}.surg"
    path.write_text(text)
    with pytest.raises(surgery.SurgError) as raised:
        program = surgery.parse(path)
        if name[:7] == "SURG060":
            config = AutoConfig.from_pretrained(folder / "configs" / "tiny_llama.json")
            surgery.apply(program, AutoModelForCausalLM.from_config(config))
        elif name[:7] in LATER:
            surgery.compile(program)
        else:
            surgery.plan(program)
    return raised.value


def rendered(error: surgery.SurgError, folder: Path) -> str:
    """The text that the command line prints, without the folder of this run."""
    return str(error).lstrip("\n").replace(f"{folder}/", "") + "\n"


@pytest.mark.parametrize("page", [page for page in PAGES if by_spec(page)], ids=lambda page: page.stem)
def test_the_example_of_a_page_gives_its_code(page: Path, tmp_path: Path, golden: Golden) -> None:
    error = failure(page.stem, example(page), tmp_path)
    assert {diagnostic.code for diagnostic in error.diagnostics if diagnostic.severity == "error"} == {page.stem}
    for diagnostic in error.diagnostics:
        assert diagnostic.span is not None
        assert diagnostic.help or diagnostic.notes
    golden(rendered(error, tmp_path), f"errors/pages/{page.stem}.txt")


@pytest.mark.parametrize(
    "path", [path for path in WRONG if not path.stem.startswith(SYNTAX)], ids=lambda path: path.stem
)
def test_wrong_specs(path: Path, tmp_path: Path, golden: Golden) -> None:
    error = failure(path.stem, path.read_text(), tmp_path)
    if path.stem.startswith("SURG"):
        assert {diagnostic.code for diagnostic in error.diagnostics} == {path.stem[:7]}
    golden(rendered(error, tmp_path), f"errors/{path.stem}.txt")
