"""How peft names things: which modules a config means, which tensor belongs to which, and what tasks are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TASKS = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "feature_extraction": "FEATURE_EXTRACTION",
}
# The heads that peft keeps whole for some tasks, whether they are named in `modules_to_save` or not.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


def is_target(path: str, targets: Sequence[str] | str) -> bool:
    """Whether `target_modules` means a module: a name or the end of one from a dot on, a text is a whole expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def is_saved(path: str, names: Iterable[str]) -> bool:
    """Whether `modules_to_save` means a module: by the end of its name, even within a component."""
    return any(path.endswith(name) for name in names)


def is_reserved(path: str, names: Iterable[str]) -> bool:
    """Whether a module is, or is inside, one of `modules_to_save`, so that peft does not adapt it."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in names)


def exactly(paths: Sequence[str], modules: Iterable[str]) -> list[str] | str:
    """`target_modules` that means these of a model's modules and no others: their names, or an expression."""
    if all(path in paths for path in modules if is_target(path, paths)):
        return list(paths)
    return "|".join(map(re.escape, paths))


def meant(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The modules of a model that a config adapts, as peft reads `target_modules` and what narrows them."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    kept = [*(config.get("modules_to_save") or []), *HEADS.get(config.get("task_type") or "", ())]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _linears(config, model)
    return [
        path
        for path, _ in model.named_modules()
        if path and not is_target(path, excluded) and not is_reserved(path, kept)
        if is_target(path, targets or []) and _in_layers(path, targets or [], config)
    ]


def _linears(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """All linear layers but the head."""
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if output is None and config.get("task_type") == "SEQ_CLS":
        output = next((head for name in (*HEADS["SEQ_CLS"],) if (head := getattr(model, name, None)) is not None), None)
    return [
        path
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not output
    ]


def _in_layers(path: str, targets: Sequence[str] | str, config: Mapping[str, Any]) -> bool:
    """Whether the first index of a path is one of `layers_to_transform`, which narrows names that are ends only."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or [r"[^.]*"]
    if layers is None or layers == [] or isinstance(targets, str) or path in targets:
        return True
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False
