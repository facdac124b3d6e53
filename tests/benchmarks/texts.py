"""The texts that benchmarks read: data sets as they are published, each compressed in a folder of its own."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def lines(path: Path) -> list[str]:
    """The lines of a compressed file, split at newlines alone."""
    return gzip.decompress(path.read_bytes()).decode("utf-8").removesuffix("\n").split("\n")


def asked_and_answered(data: Path) -> list[tuple[str, str]]:
    """Questions of Dolly and of GSM8K, each with its answer."""
    dolly = [json.loads(row) for row in lines(data / "dolly_3k" / "train.jsonl.gz")]
    sums = [json.loads(row) for row in lines(data / "gsm8k" / "train.jsonl.gz")]
    found = [("\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in dolly]
    return found + [(row["question"], row["answer"]) for row in sums]


def write_chats(data: Path, target: Path, count: int) -> None:
    """Some of them, shuffled, as conversations: one JSON object with `messages` per line."""
    pairs = asked_and_answered(data)
    random.Random(0).shuffle(pairs)
    with open(target, "w", encoding="utf-8") as file:
        for pair in pairs[:count]:
            roles = zip(("user", "assistant"), pair, strict=True)
            chat: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in roles]
            file.write(json.dumps({"messages": chat}) + "\n")


def documents(data: Path) -> list[str]:
    """Texts to pretrain on, shuffled: speeches of Tiny Shakespeare by the twenty, questions with their answers."""
    play = "\n".join(lines(data / "tinyshakespeare" / "input.txt.gz")).split("\n\n")
    speeches = ["\n\n".join(play[start : start + 20]) for start in range(0, len(play), 20)]
    found = speeches + ["\n".join(pair) for pair in asked_and_answered(data)]
    random.Random(0).shuffle(found)
    return found


def restaurants(data: Path, part: str) -> list[tuple[str, str]]:
    """E2E: meaning representations, each with one text."""
    rows = (line.partition("||") for line in lines(data / "e2e_lora_format" / f"{part}.txt.gz"))
    return [(meaning.strip(), text.strip()) for meaning, _, text in rows if text.strip()]


def grouped(rows: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """All texts of each meaning representation, in the order of the file."""
    found: dict[str, list[str]] = {}
    for meaning, text in rows:
        found.setdefault(meaning, []).append(text)
    return found
