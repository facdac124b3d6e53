"""The tensors of an adapter as peft stores them, by name, and as the factors of a weight `[..., out, in]`."""

from __future__ import annotations

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
