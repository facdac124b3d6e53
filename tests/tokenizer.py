"""A real tokenizer, trained in a moment: byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "Be brief. What is the capital of France? Paris. And how many people live there? About two million people.",
    "user assistant system model\n\nHello there, how are you?\nI am well, thank you. The answer is 42.",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen",
)
MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>",
)  # fmt: skip


@functools.cache
def _trained(size: int, markers: tuple[str, ...], texts: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(markers), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level(size: int = 400, markers: tuple[str, ...] = MARKERS, **options: Any) -> Any:
    """A tokenizer of at most `size` tokens that knows the markers; without a chat template unless one is given."""
    given = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=_trained(size, markers, TEXTS), **given)


def joining() -> Any:
    """A tokenizer without markers, whose tokens reach over the ends of turns: empty lines, brackets, both at once."""
    ends = tuple(
        f"{end}{line}" for end in ("<|", "|>", "<<|", "|>|>", "<|<|", "]", "></") for line in ("", "\n", "\n\n\n")
    )
    found = _trained(400, ("<s>", "</s>"), TEXTS + ends * 20)
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", pad_token="</s>")
