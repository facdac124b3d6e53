"""The lines of the README are run: its Python blocks in one namespace, its commands in its folder, its spec planned."""

import re
import shlex
from pathlib import Path

import pytest

import surgery
from surgery.cli import main

ROOT = Path(__file__).resolve().parent.parent


def blocks(language: str, document: str = "README.md") -> list[str]:
    """The fenced blocks of a language; `sh skip` is another language than `sh`."""
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_spec_is_planned(tmp_path: Path) -> None:
    (text,) = blocks("surg")
    plan = surgery.plan(surgery.parse(text))
    assert len(plan.sites) == 12
    assert all(site.facts.identity_at_start and site.facts.merges for site in plan.sites)


def test_the_python_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert "with lora(rank = 2)" in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines()])
def test_the_commands_run(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] == "surgery"
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main(words[1:])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    assert said.out.strip() or said.err.strip()  # `check` has nothing to answer but a word for people


def test_the_method_of_the_guide_is_a_method() -> None:
    for text in blocks("surg", "CONTRIBUTING.md"):
        surgery.parse(text)


def test_the_blocks_of_the_language_page_are_checked_and_planned() -> None:
    spec, data, *others = blocks("surg", "docs/language.md")
    assert [site.update for site in surgery.plan(surgery.parse(spec)).sites] == ["literal"] * 10
    found = surgery.parse(data).data
    assert found is not None and found.pack and found.template == "llama-3"
    for text in others:
        surgery.parse(text)
