"""What p3 knows of a model: its modules and weights, their blocks and coordinates. Works on the meta device."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from surgery.compiler.diagnostics import SurgError
from surgery.compiler.output_sizes import output_sizes
from surgery.compiler.weights import Layout, Weight, module_layout, parameter_layout

# How a transformers class says its task.
TASK_OF = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForImageClassification": "image_classification",
}
# The last part of the path of a table with a row per position.
POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")


@dataclass(frozen=True)
class Skeleton:
    """A view of a model; nothing of it is changed."""

    model: nn.Module
    examples: Mapping[str, Tensor] | None = None  # inputs of its forward, where they are known
    named_task: str | None = None  # as the program names it
    saved_sizes: Mapping[str, int] = field(default_factory=dict)  # of outputs, as a run of this model knows them

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by its path; one that is registered twice is there twice."""
        return {path: module for path, module in self.model.named_modules(remove_duplicate=False) if path}

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by its full name, tied ones under each of their names."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Every path that a pattern may name, with the real one: below a task's head the model's base may be left out,
        so `encoder.layer.0` finds `bert.encoder.layer.0`."""
        real = [*self.modules, *self.parameters]
        prefix = getattr(self.model, "base_model_prefix", "")
        below = {path[len(prefix) + 1 :]: path for path in real if prefix and path.startswith(f"{prefix}.")}
        return below | {path: path for path in real}

    @cached_property
    def owners(self) -> dict[int, list[str]]:
        """The names of each parameter by its identity: more than one where it is tied or its module shared."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            names.setdefault(id(parameter), []).append(name)
        return names

    @cached_property
    def positions(self) -> int | None:
        """How long a row may be: the size of the smallest table of learned positions; None without one (rotary)."""
        tables = [
            module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)  # as RoBERTa counts
            for path, module in self.modules.items()
            if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in POSITION_TABLES
        ]
        said = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        return min([*tables, said] if isinstance(said, int) else tables) if tables else None

    @cached_property
    def module_lists(self) -> list[str]:
        """Paths of the outermost lists of repeated blocks, in order of registration."""
        lists: list[str] = []
        for path, module in self.modules.items():
            if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in lists):
                lists.append(path)
        return lists

    def block(self, path: str) -> tuple[str, int] | None:
        """The block that a path lies in: its list and its index there."""
        for outer in self.module_lists:
            if path.startswith(f"{outer}."):
                return outer, int(path[len(outer) + 1 :].split(".")[0])
        return None

    def kind(self, path: str) -> str:
        """The path below its block; the path itself outside of all blocks."""
        block = self.block(path)
        return path if block is None else path[len(f"{block[0]}.{block[1]}.") :] or path

    def weight(self, path: str) -> Weight | str | None:
        """The adaptable weight of a module or a parameter, or why there is none; None for a class without one."""
        if path in self.parameters:
            owner, _, name = path.rpartition(".")
            if name == "weight" and (found := self.weight(owner)) is not None:
                return found
            layout = parameter_layout(self.modules.get(owner, self.model), self.parameters[path])
            return self._weight(path, path, layout, False)
        module = self.modules.get(path)
        layout = None if module is None else module_layout(module)
        biased = getattr(module, "bias", None) is not None and not isinstance(module, nn.Embedding)
        return self._weight(path, f"{path}.weight", layout, biased)

    def _weight(self, path: str, parameter: str, layout: Layout | str | None, bias: bool) -> Weight | str | None:
        if not isinstance(layout, Layout):
            return layout
        held = self.parameters[parameter]
        return Weight(path, parameter, layout, bias, id(held), str(held.dtype).removeprefix("torch."))

    def output(self, path: str) -> Weight | None:
        """A module without a weight as far as its output `[..., out]` goes; None where its size is not known."""
        size = self.saved_sizes.get(path) or self.output_sizes.get(path)
        if size is None:
            return None
        module = self.modules[path]
        held = next(
            (part for part in (*module.parameters(), *self.model.parameters()) if part.is_floating_point()), None
        )
        dtype = "float32" if held is None else str(held.dtype).removeprefix("torch.")
        return Weight(path, "", Layout("Module", size, size), False, id(module), dtype)

    @cached_property
    def output_sizes(self) -> dict[str, int]:
        """The last output size of every module, as far as the example inputs tell."""
        from surgery.compiler.examples import example_inputs

        examples = self.examples
        if examples is None:
            name = self.named_task or (self.task[0] if self.task else None)
            try:
                examples = example_inputs(self.model, name)
            except SurgError:
                return {}
        return output_sizes(self.model, examples)

    @property
    def task(self) -> tuple[str, int | None] | None:
        """The task of a transformers model by its class, with its number of labels; None for any other module."""
        if self.config is None:
            return None
        name = next((task for ending, task in TASK_OF.items() if type(self.model).__name__.endswith(ending)), None)
        if name is None:
            return None
        return name, int(self.config.num_labels) if name.endswith("_classification") else None

    @property
    def config(self) -> Any:
        """The model's configuration, if it has one."""
        return getattr(self.model, "config", None)

    def heads(self, path: str) -> Mapping[str, int]:
        """`heads` and `head_dim` of an attention projection; those of the keys and values for k and v."""
        config = self.config
        if config is None or not hasattr(config, "num_attention_heads"):
            return {}
        heads: int = config.num_attention_heads
        head_dim: int = (
            getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
        )
        name = path.rsplit(".", 1)[-1]
        if name.startswith(("k", "v")):
            heads = getattr(config, "num_key_value_heads", None) or heads
        return {"heads": heads, "head_dim": head_dim}

    @cached_property
    def numbers(self) -> int:
        """How many numbers the model holds, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all parameter names and shapes."""
        text = ";".join(f"{name}{tuple(parameter.shape)}" for name, parameter in sorted(self.parameters.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
