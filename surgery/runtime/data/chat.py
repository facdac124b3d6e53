"""Conversations to tokens by a chat template, and which of them are learnt.

What an assistant's turn adds is found by rendering the conversation up to it, and up to its end: most templates mark
nothing, and the library's own mask is then all zeros.
"""

from __future__ import annotations

import datetime
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from surgery.compiler.diagnostics import Diagnostic, SurgError
from surgery.compiler.plan import DataPlan
from surgery.runtime.data.fields import Entry
from surgery.runtime.data.forms import Tokens, encoded

Messages = list[dict[str, Any]]
TEMPLATES = Path(__file__).parent / "templates"
# What templates enclose turns and roles in; in a tokenizer that fits, each is one token.
MARKER = re.compile(r"<\|\w+\|>|<(?:start|end)_of_turn>")
WRITTEN = datetime.datetime(2024, 7, 26)  # the day that is today for templates; Llama 3 itself falls back on it


def template_text(name: str, tokenizer: Any) -> str | None:
    """The jinja text of a named template, or with `tokenizer` the tokenizer's own; None where it has none.

    Some write today's date, and a run that is resumed tomorrow needs the rows that it began with: it stands still.
    """
    if name != "tokenizer":
        return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    if not getattr(tokenizer, "chat_template", None):
        return None
    text: str = tokenizer.get_chat_template()
    if "strftime_now" not in text:
        return text
    parts = sorted(set(re.findall(r"%[A-Za-z]", text)))
    spelt = "".join(f" | replace('{part}', '{WRITTEN.strftime(part)}')" for part in parts)
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{spelt} -}}}}{{%- endmacro -%}}{text}"


def keep_template(tokenizer: Any, data: DataPlan | None) -> None:
    """Give a tokenizer the template that a run's messages were rendered with: who loads it speaks what was learnt."""
    if data is not None and data.messages is not None and data.template != "tokenizer":
        tokenizer.chat_template = template_text(data.template, tokenizer)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and where its learnt parts begin and end, in turns."""

    text: str
    bounds: tuple[int, ...]


class ChatForm:
    """Messages, `{"role": ..., "content": ...}` each, through a chat template."""

    lacks = "messages"

    def __init__(self, data: DataPlan, tokenizer: Any, fail: Callable[..., SurgError]) -> None:
        assert data.messages is not None
        self.column, self.loss, self.name, self.tokenizer = data.messages, data.loss, data.template, tokenizer
        template = template_text(data.template, tokenizer)
        if template is None:
            names = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
            message = "the model's tokenizer has no chat template, and the spec names none"
            help_text = f'name the format that the model is to learn: `template = "chatml"`; there are: {names}'
            raise fail("SURG061", message, help_text)
        self.template = template

    def warnings(self, warn: Callable[[str, str, str], Diagnostic]) -> list[Diagnostic]:
        """SURG062 if the template's markers are ordinary text for the tokenizer."""
        # A tokenizer's own template fits it.
        markers = dict.fromkeys(MARKER.findall(self.template) if self.name != "tokenizer" else ())
        pieces = {marker: len(encoded(self.tokenizer, [marker], add_special_tokens=False)[0]) for marker in markers}
        split = [f"`{marker}` ({count} tokens)" for marker, count in pieces.items() if count > 1]
        if not split:
            return []
        message = f"the markers of the template {self.name} are no tokens of this tokenizer: {', '.join(split)}"
        return [warn("SURG062", message, "name the template that the tokenizer was made for, or add the markers to it")]

    def read(self, entry: Entry) -> Messages | None:
        """The messages, without entries that are null (Parquet has every key in every message)."""
        given = entry.column(self.column)
        if given is None or (isinstance(given, (list, str)) and not given):
            return None
        if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
            kind = "a list" if isinstance(given, list) else f"a {type(given).__name__}"
            raise entry.fail("SURG051", f"column `{self.column}` holds {kind}, not a list of messages", _SHAPE)
        messages = [{name: value for name, value in message.items() if value is not None} for message in given]
        for number, message in enumerate(messages, start=1):
            if not isinstance(message.get("role"), str) or not {"content", "tool_calls"} & message.keys():
                keys = ", ".join(f"`{key}`" for key in message) or "nothing"
                where = f"message {number} of column `{self.column}`"
                raise entry.fail("SURG051", f"{where} needs a `role` and a `content`; it has {keys}", _SHAPE)
        return messages

    def encode(self, rows: Sequence[tuple[Entry, Messages]]) -> list[Tokens]:
        """The tokens of conversations, and of the pieces between their bounds, in one call of the tokenizer."""
        rendered = [self._rendered(entry, messages) for entry, messages in rows]
        texts = [[one.text, *(one.text[start:end] for start, end in pairwise((0, *one.bounds)))] for one in rendered]
        ids = encoded(self.tokenizer, [text for one in texts for text in one], add_special_tokens=False)
        ends = pairwise(accumulate(map(len, texts), initial=0))
        return [self._marked(one, *ids[start:end]) for one, (start, end) in zip(rendered, ends, strict=True)]

    def cut(self, read: Messages, tokens: Tokens, length: int) -> Tokens:
        """The end of the conversation is lost."""
        return tokens.first(length)

    def _marked(self, rendered: Rendered, whole: array[int], *pieces: array[int]) -> Tokens:
        if self.loss == "all":
            return Tokens(whole)
        bounds = self._bounds(rendered, whole, pieces)
        learned = bytearray(len(whole))
        for start, end in zip(bounds[::2], bounds[1::2], strict=True):
            learned[start:end] = b"\1" * (end - start)
        return Tokens(whole, bytes(learned))

    def _bounds(self, rendered: Rendered, whole: array[int], pieces: Sequence[array[int]]) -> list[int]:
        """Before which token of the whole each bound of the text is.

        Where a piece's own tokens are not those of the whole, the tokenizer has joined two: the bound is where the
        tokens of the text up to it leave those of the whole. To compare all bounds so takes the square of the turns.
        """
        found: list[int] = []
        place = 0
        for piece in pieces:
            if whole[place : place + len(piece)] != piece:
                break
            place += len(piece)
            found.append(place)
        if rest := rendered.bounds[len(found) :]:
            prefixes = encoded(self.tokenizer, [rendered.text[:bound] for bound in rest], add_special_tokens=False)
            found += [_common(prefix, whole) for prefix in prefixes]
        return found

    def _rendered(self, entry: Entry, messages: Messages) -> Rendered:
        whole = self._render(entry, messages)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = {"all": [], "assistant": turns, "completion": turns[-1:]}[self.loss]
        bounds: list[int] = []
        for turn in wanted:
            if turn == 0:
                message = "the conversation begins with the assistant, and a template renders nothing before a message"
                raise entry.fail("SURG061", message, "put a `user` or `system` message before it, or leave the row out")
            last = turn + 1 == len(messages)
            before = self._render(entry, messages[:turn], prompt=True)
            after = whole if last else self._render(entry, messages[: turn + 1])
            for text, what in ((before, "up to"), (after, "with")):
                if not whole.startswith(text):
                    raise self._not_a_prefix(entry, turn, what)
            bounds += [len(before), len(after)]
        return Rendered(whole, tuple(bounds))

    def _render(self, entry: Entry, messages: Messages, prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template may raise anything, jinja's own errors and Python's
            said = " ".join(str(error).split())[:300]
            message = f"{self._template()} does not render it: {type(error).__name__}: {said}"
            raise entry.fail("SURG061", message, "look at the roles of the messages and their order") from error
        return text

    def _not_a_prefix(self, entry: Entry, turn: int, what: str) -> SurgError:
        message = (
            f"{self._template()} renders the conversation {what} message {turn + 1} differently when more follows, "
            "so which tokens are the assistant's cannot be told"
        )
        others = "another `template`, or `loss = all`"
        if self.loss == "assistant":
            others = "`loss = completion`, which learns the last answer alone, or " + others
        return entry.fail("SURG061", message, f"take {others}")

    def _template(self) -> str:
        return "the tokenizer's chat template" if self.name == "tokenizer" else f"the template {self.name}"


_SHAPE = 'a conversation is [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


def _common(prefix: array[int], whole: array[int]) -> int:
    """How many first tokens are the same."""
    if whole[: len(prefix)] == prefix:
        return len(prefix)
    differing = (place for place, (one, other) in enumerate(zip(prefix, whole, strict=False)) if one != other)
    return next(differing, min(len(prefix), len(whole)))
