"""Rows to tokens, and which of them are learnt: a text, or a prompt with its completion."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from surgery.compiler.plan import DataPlan
from surgery.runtime.data.fields import Entry


@dataclass(frozen=True)
class Tokens:
    """The tokens of a row; `learned` has one byte for each, 1 where it is a label. None: all are."""

    ids: array[int]
    learned: bytes | None = None

    def first(self, length: int) -> Tokens:
        """The first tokens of a row."""
        return Tokens(self.ids[:length], None if self.learned is None else self.learned[:length])

    @property
    def teaches(self) -> bool:
        """Whether any token is predicted; the first has nothing before it."""
        return len(self.ids) > 1 if self.learned is None else 1 in self.learned[1:]


class Form(Protocol):
    """How a row becomes tokens."""

    lacks: str  # what a row that is left out does not have

    def read(self, entry: Entry) -> Any:
        """What is to be tokenised; None where the row has nothing."""

    def encode(self, rows: Sequence[tuple[Entry, Any]]) -> list[Tokens]:
        """The tokens of rows, in few calls of the tokenizer."""

    def cut(self, read: Any, tokens: Tokens, length: int) -> Tokens:
        """The first `length` tokens of a row that is longer."""


class TextForm:
    """A template over columns. A causal model's row ends with the tokenizer's end of text, which it learns with it."""

    def __init__(self, data: DataPlan, tokenizer: Any, causal: bool) -> None:
        self.template = "{text}" if data.text is None else data.text
        self.tokenizer, self.causal = tokenizer, causal
        self.lacks = "text" if data.label is None else "text or no label"

    def read(self, entry: Entry) -> str | None:
        """The filled template."""
        text = entry.text(self.template)
        return text if text.strip() else None

    def encode(self, rows: Sequence[tuple[Entry, str]]) -> list[Tokens]:
        """Texts with the tokenizer's special tokens."""
        found = encoded(self.tokenizer, [text for _, text in rows])
        return [Tokens(ended(self.tokenizer, ids) if self.causal else ids) for ids in found]

    def cut(self, read: str, tokens: Tokens, length: int) -> Tokens:
        """The tokenizer cuts, not a slice: special tokens at the end of a text stay there."""
        cut = self.tokenizer([read], truncation=True, max_length=length, verbose=False)["input_ids"][0]
        return Tokens(array("i", cut))


class CompletionForm:
    """A prompt as the model will be asked, then the completion to learn and the end of text."""

    lacks = "completion"

    def __init__(self, data: DataPlan, tokenizer: Any) -> None:
        assert data.prompt is not None and data.completion is not None
        self.prompt, self.completion, self.all = data.prompt, data.completion, data.loss == "all"
        self.tokenizer = tokenizer

    def read(self, entry: Entry) -> tuple[str, str] | None:
        """Both texts, filled."""
        prompt, completion = entry.text(self.prompt), entry.text(self.completion)
        return (prompt, completion) if completion.strip() else None

    def encode(self, rows: Sequence[tuple[Entry, tuple[str, str]]]) -> list[Tokens]:
        """The prompt's tokens are those of the prompt alone, which is what generation starts from.

        Where the tokenizer would join the prompt's end with the completion's begin, the completion is tokenised alone.
        """
        end = self.tokenizer.eos_token_id
        prompts = [without_end(ids, end) for ids in encoded(self.tokenizer, [texts[0] for _, texts in rows])]
        wholes = encoded(self.tokenizer, ["".join(texts) for _, texts in rows])
        alone = encoded(self.tokenizer, [texts[1] for _, texts in rows], add_special_tokens=False)
        found = []
        for prompt, whole, completion in zip(prompts, wholes, alone, strict=True):
            ids = whole if whole[: len(prompt)] == prompt else prompt + completion
            ids = ended(self.tokenizer, ids)
            found.append(Tokens(ids, None if self.all else bytes(len(prompt)) + b"\1" * (len(ids) - len(prompt))))
        return found

    def cut(self, read: tuple[str, str], tokens: Tokens, length: int) -> Tokens:
        """The end of the completion is lost."""
        return tokens.first(length)


def encoded(tokenizer: Any, texts: list[str], **options: Any) -> list[array[int]]:
    """Texts to tokens."""
    return [array("i", ids) for ids in tokenizer(texts, verbose=False, **options)["input_ids"]]


def ended(tokenizer: Any, ids: array[int]) -> array[int]:
    """Tokens with the tokenizer's end of text behind them, once; a tokenizer without one leaves them as they are."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == array("i", [end]) else ids + array("i", [end])


def without_end(ids: array[int], end: int | None) -> array[int]:
    """Tokens without an end of text that the tokenizer put behind them."""
    return ids[:-1] if end is not None and ids[-1:] == array("i", [end]) else ids
