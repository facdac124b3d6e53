"""The tensors of an adapter as peft stores them, by name, and as the factors of a weight `[..., out, in]`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def lora_tensors(
    prefix: str, module_class: str, left: Tensor, right: Tensor, kernel: tuple[int, int] = (1, 1)
) -> dict[str, Tensor]:
    """peft's tensors for `left @ right`, `[..., out, rank]` and `[..., rank, in]`; `prefix` names the module."""
    match module_class:
        case "Embedding":
            return {f"{prefix}.lora_embedding_A": right, f"{prefix}.lora_embedding_B": left}
        case "Conv2d":
            right, left = right.reshape(len(right), -1, *kernel), left[:, :, None, None]
        case "Experts":  # A is one expert after the other, B one rank after the other
            right, left = right.flatten(0, 1), left.permute(1, 2, 0).flatten(1)
    return {f"{prefix}.lora_A.weight": right, f"{prefix}.lora_B.weight": left}


def magnitude_tensor(prefix: str, module_class: str, vector: Tensor) -> dict[str, Tensor]:
    """peft's tensor for DoRA's vector `[out]`."""
    return {f"{prefix}.lora_magnitude_vector": vector[None, :, None, None] if module_class == "Conv2d" else vector}


def lora_factors(parts: Mapping[str, Tensor], experts: int | None) -> dict[str, Tensor]:
    """A `[..., rank, in]`, B `[..., out, rank]` and DoRA's m `[out]` from peft's tensors by their names in a module."""
    if "lora_embedding_A" in parts:
        right, left = parts["lora_embedding_A"], parts["lora_embedding_B"]
    else:
        right, left = parts["lora_A.weight"].flatten(1), parts["lora_B.weight"].flatten(1)
    if experts is not None:
        right = right.reshape(experts, -1, right.shape[1])
        left = left.reshape(len(left), -1, experts).permute(2, 0, 1)
    vector = parts.get("lora_magnitude_vector", parts.get("lora_magnitude_vector.weight"))
    return {"A": right, "B": left} | ({} if vector is None else {"m": vector.flatten()})
