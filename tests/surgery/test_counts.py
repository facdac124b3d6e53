"""Specs that claim a published count: `# Counts: 36,864 trained numbers`, checked at the paper's size, on meta."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import surgery

SPECS = Path(__file__).resolve().parents[2] / "specs"
CLAIM = re.compile(r"^# Counts: ([\d,]+) trained numbers( beside the head)?\b", re.MULTILINE)
CLAIMS = {path: found for path in sorted(SPECS.glob("*.surg")) if (found := CLAIM.search(path.read_text()))}


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_a_claimed_count_is_that_of_the_plan(path: Path) -> None:
    number, beside = CLAIMS[path].groups()
    plan = surgery.plan(surgery.parse(path))
    head = sum(entry.numbers for entry in plan.trained if entry.name.startswith("classifier."))
    assert plan.totals.trainable - (head if beside else 0) == int(number.replace(",", ""))


def test_every_claim_is_read() -> None:
    texts = {path: path.read_text() for path in SPECS.glob("*.surg")}
    assert {path for path, text in texts.items() if "# Counts:" in text} == set(CLAIMS)
