"""A folder as a user has it: a saved model with its tokenizer, and labelled rows."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification
from transformers import BertTokenizer as Tokenizer


def save_project(folder: Path) -> None:
    """Write `tiny`, a BERT of two layers with random weights and eleven words, and 60 rows in `rows.jsonl`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "one", "two", "three"]
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=24, max_position_embeddings=32)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "tiny")
    Tokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder / "tiny")
    rows = [{"text": f"{words[5 + n % 3]} {words[8 + n // 3 % 3]} " * (1 + n % 3), "kind": "ab"[n % 3 == 0]}
            for n in range(60)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
