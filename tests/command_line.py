"""The command line as a test calls it."""

from __future__ import annotations

import pytest

from surgery.cli import main


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The exit code of `surgery ARGUMENTS`, and what it wrote to standard output and error."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def succeed(*arguments: str) -> None:
    """`surgery ARGUMENTS`, which has to succeed."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code
