"""The verbs that need no model: help, fmt, explain, the schema; they start at once and never show a traceback."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from surgery.cli.common import Format, reporting
from surgery.cli.plan import schema_text
from tests.command_line import cli

ROOT = Path(__file__).parents[3]
UGLY = '# a head\nmodel "org/tiny" {task=causal_lm}\nadapt **.query {with lora(rank=4)} # behind\n'


@pytest.mark.parametrize(
    "verb",
    ["check", "plan", "compile", "train", "eval", "generate", "report", "rank", "merge", "methods", "fmt", "explain"],
)
def test_every_verb_helps_with_an_example(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, _ = cli(capsys, verb, "--help")
    assert code == 0 and "Example: surgery" in out


@pytest.mark.parametrize(
    "arguments",
    [["plan"], ["fmt"], ["compile", "a.surg"], ["no_such_verb"], ["check", "a.surg", "--format", "xml"],
     ["explain", "SURG999"], ["methods", "loraa"]],
)  # fmt: skip
def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli(capsys, *arguments)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "known", "near"),
    [
        ("train a.surg --scope modul", "graph, module", "module"),
        ("plan a.surg --scope x", "graph, module", None),
        ("check a.surg --format jsn", "text, json", "json"),
        ("export run -o a --to pefft", "peft", "peft"),
        ("export run -o a --to peft --dtype bfloat", "float32, float64, bfloat16, float16", "bfloat16"),
        ("rank a b --norm spektral", "spectral, frobenius", "spectral"),
        ("rank a b --task causal", "causal_lm, masked_lm", "causal_lm"),
        ("import a -o b.surg --task masked", "causal_lm, masked_lm", "masked_lm"),
    ],
)
def test_a_word_that_an_option_does_not_know(
    capsys: pytest.CaptureFixture[str], arguments: str, known: str, near: str | None
) -> None:
    code, _, err = cli(capsys, *arguments.split())
    said = " ".join(err.replace("│", " ").split())
    option, word = arguments.split()[-2:]
    assert code == 2 and f"{option}" in said and f"`{word}` is none of {known}" in said
    assert ("did you mean" in said) == (near is not None) and (near is None or f"did you mean `{near}`?" in said)
    assert "Value error" not in said


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_wrong_usage(capsys: pytest.CaptureFixture[str], device: str) -> None:
    code, _, err = cli(capsys, "train", "a.surg", "--device", device)
    assert code == 2 and "--device" in err and "cpu" in err


def test_a_folder_that_is_no_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "step.py").write_text("mine")
    for verb in ("train", "compile"):
        assert cli(capsys, verb, "a.surg", "-o", str(tmp_path))[0] == 2
        assert cli(capsys, verb, "a.surg", "-o", str(tmp_path / "step.py"))[0] == 2
    assert (tmp_path / "step.py").read_text() == "mine"


def test_help_and_fmt_import_no_torch(tmp_path: Path) -> None:
    (tmp_path / "a.surg").write_text(UGLY)
    for arguments in (["--help"], ["fmt", str(tmp_path / "a.surg")], ["explain", "1"]):
        code = (
            "import sys\nfrom surgery.cli import main\n"
            f"try: main({arguments!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_fmt_is_in_place_and_idempotent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.surg"
    file.write_text(UGLY)
    assert cli(capsys, "fmt", "--check", str(file))[0] == 1
    code, out, _ = cli(capsys, "fmt", "--diff", str(file))
    assert code == 0 and "-model" in out and "+model" in out and file.read_text() == UGLY
    assert cli(capsys, "fmt", str(file))[0] == 0
    formatted = file.read_text()
    assert formatted != UGLY and "# a head" in formatted and "# behind" in formatted
    assert cli(capsys, "fmt", "--check", str(file))[0] == 0
    assert json.loads(cli(capsys, "fmt", "--format", "json", str(file))[1]) == {"diagnostics": [], "changed": []}


def test_fmt_reads_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(UGLY.encode())))
    code, out, err = cli(capsys, "fmt", "-")
    assert code == 0 and out.startswith("# a head\nmodel") and err == ""


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"adapt {", b"("])
def test_bad_files_are_diagnostics(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    good, bad = tmp_path / "good.surg", tmp_path / "bad.surg"
    good.write_text(UGLY)
    if content is not None:
        bad.write_bytes(content)
    code, out, _ = cli(capsys, "fmt", "--format", "json", str(bad), str(good))
    (found,) = json.loads(out)["diagnostics"][:1]
    assert code == 1 and found["code"] in ("SURG001", "SURG011")
    assert list(found) == [
        "code",
        "severity",
        "message",
        "file",
        "line",
        "column",
        "end_line",
        "end_column",
        "notes",
        "help",
    ]
    code, out, err = cli(capsys, "fmt", str(bad))
    assert code == 1 and out == "" and "error[SURG0" in err and "Traceback" not in err
    assert good.read_text() != UGLY


def test_explain_has_a_page_of_the_same_form_for_every_code(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[dict[str, Any]] = json.loads(cli(capsys, "explain", "--format", "json")[1])["codes"]
    assert len(codes) > 30
    for entry in codes:
        code, out, _ = cli(capsys, "explain", entry["code"].lower())
        assert code == 0 and out.startswith(f"# {entry['code']}: {entry['title']}\n") and entry["title"]
        heads = [line for line in out.splitlines() if line.startswith("## ")]
        assert heads == ["## What", "## Why", "## Example", "## Fix"], entry["code"]


def test_the_published_schema_is_the_present_one(capsys: pytest.CaptureFixture[str]) -> None:
    published = ROOT / "docs" / "plan.schema.json"
    assert published.read_text() == schema_text(), "renew it: surgery plan --schema > docs/plan.schema.json"
    assert json.loads(cli(capsys, "plan", "--schema")[1])["title"] == "Plan"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = cli(capsys, "--version")
    assert code == 0 and out.strip()


def test_a_warning_that_is_a_diagnostic_is_shown_as_one() -> None:
    """Not behind a line of this project's code; others say where they come from."""
    before = warnings.formatwarning
    with reporting(Format.text):
        assert warnings.formatwarning("warning[SURG073]: x", UserWarning, "code.py", 3) == "warning[SURG073]: x\n"
        assert warnings.formatwarning("x", UserWarning, "code.py", 3).startswith("code.py:3: UserWarning: x")
    assert warnings.formatwarning is before
