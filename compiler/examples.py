"""Example inputs for capture, made from the task and the model's config: shapes matter, values only have to fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.compiler.diagnostics import fail

BATCH, LENGTH, TARGET = 3, 11, 7  # all different and none of them 1, so that no two sizes are taken for one
_TEXT = ("masked_lm", "sequence_classification", "token_classification", "feature_extraction")


def example_inputs(model_or_config: Any, task: str | None, packed: bool = False) -> dict[str, Tensor]:
    """Inputs to capture the model with, on the CPU: `input_ids` [3, 11] within the vocabulary, or `pixel_values`.

    Encoders get an `attention_mask`, sequence-to-sequence models `decoder_input_ids` [3, 7] too. A decoder gets none:
    it trains on right-padded rows, where a mask changes nothing for a real token and costs flash attention. `packed`
    rows hold two documents, which `position_ids` [3, 11] tell apart by starting over. Raises
    SURG042 where task and config do not say what the model reads.
    """
    config = getattr(model_or_config, "config", model_or_config)
    text = hasattr(config, "model_type") and hasattr(config.get_text_config(), "vocab_size")
    image = hasattr(config, "model_type") and (task == "image_classification" or hasattr(config, "image_size"))
    if task is None or not (text or image):
        raise fail(
            "SURG042",
            f"example inputs cannot be made for a {type(model_or_config).__name__}"
            + ("" if task is None else f" with task {task}"),
            help="pass `example_inputs`, a dict of tensors by the names of the forward's parameters",
        )
    if task == "image_classification" or not text:
        return {"pixel_values": _pixels(config)}
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": _tokens(config, LENGTH, generator)}
    length = inputs["input_ids"].shape[1]
    if packed:
        lengths = (length // 3 + 1 + row for row in range(BATCH))  # of the first document: another in each row
        rows = [torch.cat([torch.arange(first), torch.arange(length - first)]) for first in lengths]
        inputs["position_ids"] = torch.stack(rows)
    if task == "causal_lm" or (task in _TEXT and is_decoder(config)):
        return inputs
    inputs["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    if task == "seq2seq_lm":
        inputs["decoder_input_ids"] = _tokens(config, TARGET, generator)
    return inputs


def is_decoder(config: Any) -> bool:
    """Whether the config's architecture is a decoder alone, which reads from left to right for every task."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.get_text_config().model_type
    if getattr(config, "is_encoder_decoder", False):
        return False
    # BERT and its kind can be decoders too, but are encoders unless their config says so.
    both = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (not both or bool(getattr(config, "is_decoder", False)))


def _tokens(config: Any, length: int, generator: torch.Generator) -> Tensor:
    text = config.get_text_config()
    size, longest = int(text.vocab_size), getattr(text, "max_position_embeddings", None)
    length = min(length, longest or length)
    special = {getattr(text, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    ordinary = torch.tensor([number for number in range(min(size, 512)) if number not in special] or [0])
    return ordinary[torch.randint(len(ordinary), (BATCH, length), generator=generator)]


def _pixels(config: Any) -> Tensor:
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if size is None:
        size = 224  # models without a size of their own (convolutional ones) take any; this is what they were made for
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(BATCH, int(channels), int(height), int(width), generator=torch.Generator().manual_seed(0))
