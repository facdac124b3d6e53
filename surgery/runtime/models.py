"""The spec's model: its skeleton on the meta device for planning, with weights for training, and its tokenizer.

A model is a hub id, a local folder (relative to the spec's), `package:NAME/folder` (a folder inside an installed
package, found without importing it), a config file with random weights, or a Python factory.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.compiler.diagnostics import did_you_mean, fail
from surgery.compiler.plan import ModelPlan
from surgery.runtime.model_files import access, place_of, reading

CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "image_classification": "AutoModelForImageClassification",
    "feature_extraction": "AutoModel",
}  # task -> the class of transformers that makes its model
_NEW_HEAD = ("sequence_classification", "token_classification", "image_classification")


def load_skeleton(model: ModelPlan, folder: Path, *, allow_code: bool = False, meta: bool = True) -> nn.Module:
    """The model on the meta device: modules, names, shapes and dtypes, without reading or allocating a weight.

    `folder` is the spec's. Without `meta` it is wherever the caller has modules made. Raises SURG030 (unreadable),
    SURG031 (the task does not fit the model), SURG029 (a Python factory without `allow_code`).
    """
    if model.source == "python":
        with torch.device("meta"):
            return _from_python(model, allow_code)
    with reading(model), torch.device("meta") if meta else nullcontext():
        return _from_config(model, _config(model, folder))


def load_model(
    model: ModelPlan,
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    label_names: Sequence[str] = (),
    allow_code: bool = False,
) -> nn.Module:
    """The model with its weights, in evaluation mode; what the checkpoint lacks (a new head) is drawn from `seed`.

    Raises SURG029, SURG030 and SURG031 like `load_skeleton`, and SURG030 where the checkpoint lacks a weight that is
    no task head.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model.source == "python":
            loaded = _from_python(model, allow_code)
        elif model.source == "config":
            with reading(model):
                loaded = _from_config(model, _config(model, folder))
        else:
            loaded = _from_checkpoint(model, folder)
    name_labels(loaded, label_names)
    return loaded.to(device).eval()


def load_tokenizer(model: ModelPlan, folder: Path) -> Any:
    """The tokenizer that the spec names, else the model's, padding on the right; SURG030 if there is none.

    Raises SURG031 for a named one that has more tokens than the model's vocabulary.
    """
    source = model
    if model.tokenizer is not None:
        source = model.model_copy(update={"source": "hub", "name": model.tokenizer, "revision": None})
    if source.source in ("config", "python"):
        raise fail(
            "SURG030",
            f'the model "{model.name}" has no tokenizer: it is made from a {model.source} source',
            help='name one in the model\'s settings: `tokenizer = "FOLDER"` or a hub id',
        )
    from transformers import AutoTokenizer

    with reading(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(place_of(source, folder), **access(source, folder))
    if model.tokenizer is not None and model.source != "python":
        with reading(model):
            size = getattr(_config(model, folder).get_text_config(), "vocab_size", None)
        if size is not None and len(tokenizer) > size:
            message = (
                f'the tokenizer "{model.tokenizer}" has {len(tokenizer):,} tokens, the model\'s vocabulary {size:,}'
            )
            raise fail("SURG031", message, help="take the tokenizer that the model was made for")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:  # decoders are trained without one; what pads is labelled -100 and never read
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def name_labels(model: nn.Module, names: Sequence[str]) -> None:
    """Write the names of the labels into the model's config, so that a saved model tells them."""
    config = getattr(model, "config", None)
    if names and config is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}


def _from_config(model: ModelPlan, config: Any) -> nn.Module:
    dtype = _dtype(model) or getattr(config, "dtype", None) or torch.float32
    made: nn.Module = _class(model, config).from_config(config, dtype=dtype, **_attention(model))
    return made


def _from_checkpoint(model: ModelPlan, folder: Path) -> nn.Module:
    with reading(model):
        config = _config(model, folder)
        loaded, report = _class(model, config).from_pretrained(
            place_of(model, folder),
            config=config,
            dtype=_dtype(model) or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for another number of labels is drawn anew; anything else is refused
            **_attention(model),
            **access(model, folder),
        )
    mismatched = {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]}
    lacking = sorted(key for key in {*report["missing_keys"], *mismatched} if not _is_head(key, loaded, model.task))
    if lacking:
        shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        raise fail(
            "SURG030",
            f'the checkpoint "{model.name}" does not hold every weight of {type(loaded).__name__}: {shown}',
            help="take a checkpoint that was saved for this task and architecture",
        )
    assert isinstance(loaded, nn.Module)
    return loaded


def _is_head(key: str, model: nn.Module, task: str | None) -> bool:
    # A classifier starts anew, and so does the pooler below it, which checkpoints of language models leave out.
    if ".pooler." in f".{key}":
        return True
    return task in _NEW_HEAD and not key.startswith(f"{getattr(model, 'base_model_prefix', '')}.")


def _from_python(model: ModelPlan, allow_code: bool) -> nn.Module:
    if not allow_code:
        raise fail("SURG029", f'the model "{model.name}" is Python code, which runs only with --allow-code')
    module_name, _, attribute = model.name.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), attribute)()
    except Exception as error:  # someone else's code may raise anything
        raise fail("SURG030", f'the factory "{model.name}" failed: {type(error).__name__}: {error}') from error
    if not isinstance(made, nn.Module):
        raise fail("SURG030", f'the factory "{model.name}" returned a {type(made).__name__}, not a torch.nn.Module')
    return made


def _config(model: ModelPlan, folder: Path) -> Any:
    from transformers import AutoConfig

    labels = {} if model.labels is None else {"num_labels": model.labels}
    if model.source == "config":
        return _config_file(model, folder, labels)
    return AutoConfig.from_pretrained(place_of(model, folder), **labels, **access(model, folder))


def _config_file(model: ModelPlan, folder: Path, labels: dict[str, int]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / model.name
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise fail("SURG030", f"the config {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise fail("SURG030", f"the config {path} is not JSON: {error}") from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind not in CONFIG_MAPPING:
        hint = did_you_mean(str(kind), CONFIG_MAPPING)
        raise fail("SURG030", f"the config {path} has no `model_type` that transformers knows: {kind!r}", help=hint)
    if labels:
        fields = {name: value for name, value in fields.items() if name not in ("id2label", "label2id")}
    return AutoConfig.for_model(**{**fields, **labels})


def _class(model: ModelPlan, config: Any) -> Any:
    """The transformers class of the task; SURG031 with the tasks that fit if the architecture has none for it."""
    import transformers

    if model.task is None:
        raise fail("SURG031", f'the model "{model.name}" needs a task', help=f"write `task = {next(iter(CLASSES))}`")
    fitting = [task for task, name in CLASSES.items() if type(config) in getattr(transformers, name)._model_mapping]
    if model.task not in fitting:
        raise fail(
            "SURG031",
            f'task {model.task} does not fit the model "{model.name}" ({config.model_type})',
            help=f"tasks that fit: {', '.join(fitting)}" if fitting else None,
        )
    return getattr(transformers, CLASSES[model.task])


def _dtype(model: ModelPlan) -> torch.dtype | None:
    return None if model.dtype is None else getattr(torch, model.dtype)


def _attention(model: ModelPlan) -> dict[str, str]:
    return {} if model.attention is None else {"attn_implementation": model.attention}
