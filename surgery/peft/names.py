"""How peft names things: which modules a config means, which tensor belongs to which, and what tasks are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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
