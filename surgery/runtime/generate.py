"""Text from a run: the adapted model in module scope, and transformers' own `generate` with its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.compiler.diagnostics import fail
from surgery.compiler.plan import Plan
from surgery.runtime.data.chat import template_text
from surgery.runtime.data.forms import encoded, without_end
from surgery.runtime.run_folder import load_state

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Speaker:
    """A run that speaks: its model, adapted in place, and its tokenizer."""

    plan: Plan
    model: nn.Module
    tokenizer: Any

    @property
    def positions(self) -> int | None:
        """How many tokens the model can tell apart by their place; None where its config does not say."""
        config: Any = self.model.config
        return getattr(config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Generated:
    """What was generated, and why it ends: a token that says so, the limit, or the last of the model's positions."""

    text: str
    prompt_tokens: int
    tokens: int
    ended: Literal["stop", "length", "positions"]


def load_speaker(run: Path, device: torch.device | str = "cpu", *, allow_code: bool = False) -> Speaker:
    """A run to generate from. Raises SURG070 for one that is no causal model, SURG030 for one without a tokenizer."""
    from surgery.api import at_model_line, parse
    from surgery.runtime.models import load_model, load_tokenizer
    from surgery.runtime.modules import apply_run

    state = load_state(run)
    plan, program = state.plan, parse(state.spec, state.folder, state.plan.file)
    with at_model_line(program):
        if plan.model.task != "causal_lm":
            what = "has no task" if plan.model.task is None else f"has the task {plan.model.task}"
            raise fail("SURG070", f"the run's model {what}, and only a causal model continues a text")
        tokenizer = load_tokenizer(plan.model, state.folder)
        first = "cpu" if plan.quantized else device  # dense weights go there one by one, to be quantized
        model = load_model(plan.model, state.folder, first, seed=plan.step.seed, allow_code=allow_code)
        if not hasattr(model, "generate"):
            raise fail("SURG070", f"{type(model).__name__} has no `generate` of its own")
    return Speaker(plan, apply_run(run, model, torch.device(device)), tokenizer)


def prompt_tokens(speaker: Speaker, prompt: str | Messages) -> list[int]:
    """The tokens that a text begins with, as the run's own prompts do; messages go through its data's template.

    Raises SURG061 where there is no template or it does not render the messages, SURG070 for a prompt without tokens.
    """
    text = prompt if isinstance(prompt, str) else _rendered(speaker, prompt, answered=None)
    options = {} if isinstance(prompt, str) else {"add_special_tokens": False}
    ids = list(without_end(encoded(speaker.tokenizer, [text], **options)[0], speaker.tokenizer.eos_token_id))
    if not ids:
        raise fail("SURG070", "the prompt has no tokens", help="give it a word to begin with")
    return ids


def generate(
    speaker: Speaker,
    prompt: str | Messages,
    *,
    limit: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    said: Callable[[str], None] | None = None,
) -> Generated:
    """Continue a prompt by at most `limit` tokens: the likeliest each, or with a temperature drawn from `seed`.

    `said` is called with pieces of the text as they come. Raises SURG070 for a prompt that leaves no position free.
    """
    from transformers import GenerationConfig

    model: Any = speaker.model
    ids = prompt_tokens(speaker, prompt)
    room = limit if speaker.positions is None else speaker.positions - len(ids)
    if room < 1:
        message = f"the prompt has {len(ids):,} tokens, and the model no more than {speaker.positions:,} positions"
        raise fail("SURG070", message, help="shorten the prompt")
    stops = _stops(speaker, prompt)
    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    # In place of the model's own, whose settings would be taken where nothing is said here.
    model.generation_config = GenerationConfig(
        max_new_tokens=min(limit, room), use_cache=True, eos_token_id=stops or None,
        pad_token_id=speaker.tokenizer.pad_token_id, bos_token_id=speaker.tokenizer.bos_token_id, **sampled,
    )  # fmt: skip
    torch.manual_seed(seed)
    inputs = torch.tensor([ids], device=model.device)
    streamer = None if said is None else _streamer(speaker.tokenizer, said)
    output: Tensor = model.generate(inputs, attention_mask=torch.ones_like(inputs), streamer=streamer)
    new = output[0, len(ids) :].tolist()
    text = speaker.tokenizer.decode(new, skip_special_tokens=True)
    ended: Literal["stop", "length", "positions"] = "length" if len(new) >= limit else "positions"
    return Generated(text, len(ids), len(new), "stop" if new and new[-1] in stops else ended)


def _stops(speaker: Speaker, prompt: str | Messages) -> list[int]:
    """The tokens that end a text: the tokenizer's, the model's, and in a conversation what follows an answer."""
    config: Any = getattr(speaker.model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    found = [speaker.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    if not isinstance(prompt, str):
        answer = "surgery"
        rest = _rendered(speaker, prompt, answered=answer).rpartition(answer)[2]
        (after,) = encoded(speaker.tokenizer, [rest.lstrip()], add_special_tokens=False)
        found += [token for token in after[:1] if token in speaker.tokenizer.added_tokens_decoder]
    return list(dict.fromkeys(token for token in found if token is not None))


def _rendered(speaker: Speaker, messages: Messages, answered: str | None) -> str:
    """Messages as text, up to where the answer begins, or with an answer behind them."""
    data = speaker.plan.data
    name = "tokenizer" if data is None or data.messages is None else data.template
    template = template_text(name, speaker.tokenizer)
    if template is None:
        message = "neither the run's data nor the model's tokenizer has a chat template"
        raise fail("SURG061", message, help="give the text itself with --prompt")
    if answered is not None:
        messages = [*messages, {"role": "assistant", "content": answered}]
    try:
        text: str = speaker.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=answered is None
        )
    except Exception as error:  # a template may raise anything, jinja's own errors and Python's
        what = f"the chat template does not render the messages: {type(error).__name__}: {error}"
        raise fail("SURG061", what, help="look at the roles of the messages and their order") from error
    return text


def _streamer(tokenizer: Any, said: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Words as soon as they are whole."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                said(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
