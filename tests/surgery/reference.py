"""A model whose adapted sites are computed by the functions in `references/`: nothing here uses the compiler."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent


@functools.cache
def references() -> Mapping[str, Callable[..., Any]]:
    """Every function of the files in `references/` by its name."""
    found: dict[str, Callable[..., Any]] = {}
    for path in sorted((HERE / "references").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"references_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_"):
                assert name not in found, f"two references of {name}"
                found[name] = value
    return found


@dataclass
class Reference:
    """A model in float64 with every adapted site computed by the reference of its method; differentiable."""

    step: Any
    model: Any
    start: Mapping[str, Tensor]
    trained: dict[str, Tensor] = field(default_factory=dict)  # leaves by key
    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # by path: what a reference is given

    def __post_init__(self) -> None:
        plan, leaves = self.step.plan, dict[str, Tensor]()
        for number, site in enumerate(plan.sites):
            for tensor in site.tensors:
                value = self.step.parameters_by_site[site.path][tensor.name].detach().clone()
                value = value.double() if value.is_floating_point() else value
                leaf = leaves.setdefault(tensor.key, value.requires_grad_(tensor.role == "train"))
                if tensor.role == "train":
                    self.trained[tensor.key] = leaf
            name = plan.formulas[site.formula].method
            assert name in references(), f"tests/surgery/references has no function `{name}`"
            stored = self.model.get_parameter(site.parameter).detach()
            self.records[site.path] = {
                "t": {tensor.name: leaves[tensor.key] for tensor in site.tensors},
                "W": stored.T if site.module_class == "Conv1D" else stored,
                "p": {**plan.formulas[site.formula].arguments, **self._place(site, number)},
                "of": references()[name],
                "penalty": references().get(f"{name}_penalty"),
            }

    def _place(self, site: Any, number: int) -> dict[str, Any]:
        """Where a site stands, counted here once more."""
        sites, config = self.step.plan.sites, self.model.config
        block, kind = block_and_kind(site.path)
        blocks = sorted({block_and_kind(other.path)[0] for other in sites})
        kinds = list(dict.fromkeys(block_and_kind(other.path)[1] for other in sites))
        heads = config.num_attention_heads
        few = getattr(config, "num_key_value_heads", heads) if kind.endswith(("k_proj", "v_proj")) else heads
        same = [other.path for other in sites if block_and_kind(other.path)[1] == kind]
        return {
            "layer": blocks.index(block), "layers": len(blocks), "slot": kinds.index(kind), "slots": len(kinds),
            "site": number, "sites": len(sites), "heads": few, "max_heads": heads,
            "head_dim": config.hidden_size // heads,
            "step": 0, "steps": self.step.steps,
            "max_in": max(other.shape[1] for other in sites), "max_out": max(other.shape[0] for other in sites),
            "start": {tensor.name: self.start[tensor.key] for tensor in site.tensors},
            "weight_of": functools.partial(_stored, site),
            "earlier": [self.records[path] for path in reversed(same[: same.index(site.path)])],
        }  # fmt: skip

    def _result(self, path: str) -> Any:
        record = self.records[path]
        return record["of"](record["W"], record["t"], record["p"])

    def weight(self, path: str) -> tuple[Tensor, Tensor | None] | None:
        """The effective weight and bias of a site; None where the plan says that it has none."""
        site = next(site for site in self.step.plan.sites if site.path == path)
        result, bias = self._result(path), getattr(self.model.get_submodule(path), "bias", None)
        if isinstance(result, Tensor):
            weight = torch.diag(result) if result.dim() == 1 else result  # a norm's is a vector
            return weight.detach(), None if bias is None else bias.detach()
        if not site.facts.merges or site.module_class not in ("Linear", "Conv1D"):
            return None
        W = self.records[path]["W"]
        zero = torch.zeros(1, W.shape[1], dtype=W.dtype)
        base = torch.zeros(W.shape[0], dtype=W.dtype) if bias is None else bias.detach()
        constant = result(zero, base[None])[0].detach()
        eye = torch.eye(W.shape[1], dtype=W.dtype)
        weight = (result(eye, eye @ W.T + base).detach() - constant).T
        return weight, None if bias is None and not constant.any() else constant

    def penalty(self) -> Tensor:
        """What the methods add to the loss, summed over the sites; differentiable."""
        records = [record for record in self.records.values() if record["penalty"] is not None]
        return sum((record["penalty"](record["t"], record["p"]) for record in records), torch.zeros(()).double())

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The logits."""
        hooks = [
            self.model.get_submodule(path).register_forward_hook(functools.partial(self._hook, path))
            for path in self.records
        ]
        try:
            return logits_of(self.model(**inputs))
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        record = self.records[path]
        record["x"] = args[0] if args else None
        result = self._result(path)
        if isinstance(result, Tensor) and result.dim() == 1:  # a norm's
            assert isinstance(module, nn.LayerNorm)
            return F.layer_norm(args[0], result.shape, result, module.bias, module.eps)
        if isinstance(result, Tensor):
            return F.linear(args[0], result, getattr(module, "bias", None))
        return result(args[0], output)


def _stored(site: Any, folder: str) -> Tensor:
    """A site's W in another checkpoint."""
    found = load_file(Path(folder) / "model.safetensors")[site.parameter]
    return found.T if site.module_class == "Conv1D" else found


def block_and_kind(path: str) -> tuple[int, str]:
    """The first number in a path, and what stands below it."""
    parts = path.split(".")
    index = next(index for index, part in enumerate(parts) if part.isdigit())
    return int(parts[index]), ".".join(parts[index + 1 :])


def logits_of(output: Any) -> Tensor:
    """The logits of a model that returns a tensor, or of one that returns a structure."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found
