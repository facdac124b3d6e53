"""Nested Python values with tensors in them <-> JSON and a flat dictionary of tensors, so that no state needs pickle.

JSON has fewer kinds of values, so some are written as an object with one key: `{"$tensor": name}`, `{"$tuple": [...]}`,
`{"$items": [[key, value], ...]}` for dictionaries whose keys are not all text, `{"$float": "nan"}`.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The JSON form of `value`; its tensors go into `tensors` under their path. Raises TypeError for other objects."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, _below(path, number)) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        packed = [(key, pack(item, tensors, _below(path, key))) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(packed)
        return {"$items": [[pack(key, {}), item] for key, item in packed]}
    raise TypeError(f"a {type(value).__name__} at `{path}` cannot be saved")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value of a JSON form; raises KeyError or ValueError where it is none."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        match tag:
            case "$tensor":
                return tensors[content]
            case "$float":
                return float(content)
            case "$tuple":
                return tuple(unpack(item, tensors) for item in content)
            case "$items":
                return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
    return {key: unpack(item, tensors) for key, item in value.items()}


def _below(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)
