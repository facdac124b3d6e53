"""What peft calls its methods, and which method of the language each is, with its tensors by the names there.

A type of peft is one function: from a module of an adapter to a call and its tensors. What a config may say is listed
with it; anything else has to be as it is by default, or the import is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from torch import Tensor

from surgery.builders import method
from surgery.compiler import nodes
from surgery.peft.layout import lora_factors

# What every config says, and what is read or changes training alone.
GENERAL = (
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "init_weights",
)  # fmt: skip


class Unsupported(Exception):
    """A setting that has no counterpart: its name in the config, and why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


@dataclass(frozen=True)
class Layer:
    """One module that an adapter changes; `parts` are its tensors by peft's names, None where there are none."""

    path: str
    config: Mapping[str, Any]
    parts: Mapping[str, Tensor] | None = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)  # tensors of no module
    experts: int | None = None

    def setting(self, name: str, patterns: str = "") -> Any:
        """A setting, or what a pattern says of it for this module."""
        for pattern, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", self.path):
                return value
        return self.config.get(name)

    def named(self, **names: str) -> dict[str, Tensor]:
        """Its tensors by our names: `named(A="hira_A")`."""
        if self.parts is None:
            return {}
        lacking = [theirs for theirs in names.values() if theirs not in self.parts]
        if lacking:
            raise Unsupported(f"{self.path}.{lacking[0]}", "the adapter has no such tensor")
        return {ours: self.parts[theirs] for ours, theirs in names.items()}


@dataclass(frozen=True)
class Reading:
    """A module in the language: the method with its arguments, its tensors, and its text if it is not the library's."""

    call: nodes.Call
    tensors: Mapping[str, Tensor]
    text: str = ""


@dataclass(frozen=True)
class Kind:
    """One type of peft. `mark` begins its tensors' names; `free` settings may have any value, others their default."""

    mark: str
    read: Callable[[Layer], Reading | None]
    free: Sequence[str]
    default: Mapping[str, Any]
    classes: Sequence[str] = ("Linear",)
    shared: Sequence[str] = ()


KINDS: dict[str, Kind] = {}


def kind(
    name: str, mark: str, free: Sequence[str] = (), default: Mapping[str, Any] | None = None,
    classes: Sequence[str] = ("Linear",), shared: Sequence[str] = (),
) -> Callable[[Callable[[Layer], Reading | None]], Callable[[Layer], Reading | None]]:  # fmt: skip
    """Register a type of peft."""

    def register(read: Callable[[Layer], Reading | None]) -> Callable[[Layer], Reading | None]:
        KINDS[name] = Kind(mark, read, (*GENERAL, *free), default or {}, classes, shared)
        return read

    return register


def check_settings(found: Kind, config: Mapping[str, Any]) -> list[Unsupported]:
    """What a config says that is neither free nor the default."""
    return [
        Unsupported(name, f"{value!r} has no counterpart here")
        for name, value in config.items()
        if name not in found.free and value not in (None, False, {}, [], "", found.default.get(name))
    ]


def call(name: str, dropout: Any = 0, **arguments: Any) -> nodes.Call:
    """A call of a method, its dropout said where there is one, and whole numbers said as such."""
    named = arguments | ({"dropout": dropout} if dropout else {})
    return method(name, **{
        key: int(value) if isinstance(value, float) and value.is_integer() else value for key, value in named.items()
    })  # fmt: skip


LORA_TRAINING = ("loftq_config", "eva_config", "lora_dropout", "bias")
LORA_DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16}
MOVES_W = {"pissa": "pissa", "olora": "olora"}  # starts that change W, as methods of the library do
STARTS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal")  # those that do not


@kind(
    "LORA", "lora_", default=LORA_DEFAULTS, classes=("Linear", "Conv1D", "Embedding", "Conv2d", "Experts", "Parameter"),
    free=(*LORA_TRAINING, "r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern",
          "alpha_pattern", "target_parameters", "ensure_weight_tying"),
)  # fmt: skip
def lora(layer: Layer) -> Reading:
    """LoRA, rsLoRA, DoRA, PiSSA and OLoRA; other starts leave no trace in an adapter."""
    config = layer.config
    rank, alpha = layer.setting("r", "rank_pattern"), layer.setting("lora_alpha", "alpha_pattern")
    start, scaled = config.get("init_lora_weights", True), bool(config.get("use_dora"))
    if start not in (*STARTS, *MOVES_W):
        reason = f"the start `{start}` changes the model's weights in a way that no adapter tells"
        raise Unsupported("init_lora_weights", reason)
    if start in MOVES_W and scaled:
        raise Unsupported("use_dora", f"a DoRA that starts with `{start}` is no method here")
    name = MOVES_W.get(str(start), "dora" if scaled else "rslora" if config.get("use_rslora") else "lora")
    if config.get("use_rslora") and name != "rslora":
        alpha = alpha * math.sqrt(rank)
    embedding = "lora_embedding_A" in (layer.parts or {})
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    layer.named(A=names[0], B=names[1])  # both are there
    tensors = {} if layer.parts is None else lora_factors(layer.parts, layer.experts)
    if scaled and embedding:
        raise Unsupported("use_dora", "peft scales rows of an embedding's storage, which are columns of its W")
    return Reading(call(name, config.get("lora_dropout"), rank=rank, alpha=alpha), tensors)


@kind(
    "ADALORA", "lora_", default=LORA_DEFAULTS, classes=("Linear", "Conv1D"),
    free=(*LORA_TRAINING, "r", "lora_alpha", "init_lora_weights", "rank_pattern", "target_r", "init_r", "tinit",
          "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
)  # fmt: skip
def adalora(layer: Layer) -> Reading | None:
    """AdaLoRA with the ranks that it has: what was pruned is not in the adapter; None where nothing is left."""
    config, initial = layer.config, layer.config["init_r"]
    chosen = [
        mask for name, mask in (config.get("rank_pattern") or {}).items() if name.startswith(f"{layer.path}.lora_")
    ]
    tensors = layer.named(Q="lora_A", P="lora_B", E="lora_E")
    rank = len(tensors["Q"]) if tensors else sum(chosen[0]) if chosen else initial
    alpha = config["lora_alpha"] if config["lora_alpha"] > 0 else initial
    if rank == 0:
        return None
    if tensors:
        tensors["E"] = tensors["E"].flatten()
    arguments = {"rank": rank, "alpha": alpha, "initial": initial}
    text = (files("surgery.peft") / "adalora.surg").read_text("utf-8")
    return Reading(call("pruned_adalora", config.get("lora_dropout"), **arguments), tensors, text)


@kind(
    "VERA", "vera_lambda_", classes=("Linear", "Conv1D"), shared=("base_model.vera_A", "base_model.vera_B"),
    free=("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "bias"),
)  # fmt: skip
def vera(layer: Layer) -> Reading:
    """VeRA, whose two frozen matrices have to be in the adapter."""
    tensors = layer.named(d="vera_lambda_d", b="vera_lambda_b")
    if tensors and not all(name in layer.shared for name in KINDS["VERA"].shared):
        raise Unsupported("save_projection", "the adapter does not hold the projections, which peft draws on its own")
    if tensors:
        tensors |= {"A": layer.shared["base_model.vera_A"], "B": layer.shared["base_model.vera_B"]}
    return Reading(call("vera", layer.config.get("vera_dropout"), rank=layer.config["r"]), tensors)


@kind("LOHA", "hada_", classes=("Linear", "Conv2d"),
      free=("r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout"))  # fmt: skip
def loha(layer: Layer) -> Reading:
    """LoHa without the tensors that convolutions may have."""
    if "hada_t1" in (layer.parts or {}):
        raise Unsupported("use_effective_conv2d", "a product of three tensors is no LoHa here")
    tensors = layer.named(B1="hada_w1_a", A1="hada_w1_b", B2="hada_w2_a", A2="hada_w2_b")
    rank, alpha = layer.setting("r", "rank_pattern"), layer.setting("alpha", "alpha_pattern")
    return Reading(call("loha", rank=rank, alpha=alpha), tensors)


@kind("LOKR", "lokr_", free=("r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout",
                             "rank_dropout_scale", "decompose_factor"), default={"decompose_factor": -1})  # fmt: skip
def lokr(layer: Layer) -> Reading:
    """LoKr of a square matrix and a product of two narrow ones."""
    factor = layer.config.get("decompose_factor", -1)
    if layer.parts is not None:
        lacking = next((name for name in ("lokr_w1", "lokr_w2_a", "lokr_w2_b") if name not in layer.parts), None)
        if lacking:
            key = "decompose_both" if lacking == "lokr_w1" else "r"
            raise Unsupported(key, f"`{layer.path}` has no `{lacking}`: it is the product of other matrices")
        rows, columns = layer.parts["lokr_w1"].shape
        if rows != columns:
            raise Unsupported(
                "decompose_factor", f"the first matrix of `{layer.path}` is {rows} x {columns}, no square"
            )
        factor = rows
    if factor < 1:
        raise Unsupported("decompose_factor", "the factor is not said, and without tensors it cannot be seen")
    tensors = layer.named(C="lokr_w1", B="lokr_w2_a", A="lokr_w2_b")
    rank, alpha = layer.setting("r", "rank_pattern"), layer.setting("alpha", "alpha_pattern")
    return Reading(call("lokr", rank=rank, alpha=alpha, factor=factor), tensors)


@kind("IA3", "ia3_", classes=("Linear", "Conv1D"), free=("feedforward_modules", "init_ia3_weights"))
def ia3(layer: Layer) -> Reading:
    """(IA)^3: the output scaled, or in feed-forward modules the input."""
    inner = layer.config.get("feedforward_modules") or []
    if isinstance(inner, str):
        scales_input = re.fullmatch(inner, layer.path) is not None
    else:
        scales_input = any(layer.path.endswith(name) for name in inner)
    tensors = {name: tensor.flatten() for name, tensor in layer.named(l="ia3_l").items()}
    return Reading(call("ia3_input" if scales_input else "ia3"), tensors)


@kind("OFT", "oft_", free=("r", "oft_block_size", "module_dropout", "eps", "use_cayley_neumann",
                           "num_cayley_neumann_terms", "bias"))  # fmt: skip
def oft(layer: Layer) -> Reading:
    """OFT by the Cayley transform, or by the first terms of its Neumann series, which is a rotation only nearly."""
    tensors = layer.named(q="oft_R.weight")
    block = layer.config.get("oft_block_size")
    if not block and tensors:
        block = (1 + math.isqrt(1 + 8 * tensors["q"].shape[1])) // 2
    if not block:
        raise Unsupported("oft_block_size", "it is not said, and without tensors it cannot be seen")
    if not layer.config.get("use_cayley_neumann", True):
        return Reading(call("oft", block=block), tensors)
    terms = layer.config.get("num_cayley_neumann_terms", 5)
    if terms < 3:
        raise Unsupported("num_cayley_neumann_terms", "a series of fewer than three terms is read otherwise by peft")
    powers = [f"{'-' if k % 2 else '+'} {2 if k < terms - 1 else 1} * {' @ '.join('S' * k)}" for k in range(1, terms)]
    text = f"""# OFT by {terms} terms of a Neumann series, as peft computes it. Qiu et al. 2023, arXiv:2306.07280.
method oft_series(block: int) {{
    q = train zeros[in / block, block * (block - 1) / 2]
    S = skew(q, size = block)
    weight = W @ blockdiag(eye(block) {" ".join(powers)})
}}
"""
    return Reading(call("oft_series", block=block), tensors, text)


@kind("HIRA", "hira_", classes=("Linear", "Conv1D"), free=("r", "hira_dropout", "rank_pattern"))
def hira(layer: Layer) -> Reading:
    """HiRA."""
    rank = layer.setting("r", "rank_pattern")
    return Reading(call("hira", layer.config.get("hira_dropout"), rank=rank), layer.named(A="hira_A", B="hira_B"))


@kind("DELORA", "delora_", free=("r", "delora_lambda", "module_dropout", "rank_pattern", "lambda_pattern", "bias"))
def delora(layer: Layer) -> Reading:
    """DeLoRA."""
    tensors = layer.named(A="delora_A", B="delora_B", s="delora_lambda", w="delora_w_norm")
    rank, strength = layer.setting("r", "rank_pattern"), layer.setting("delora_lambda", "lambda_pattern")
    return Reading(call("delora", rank=rank, strength=strength), tensors)


@kind("C3A", "c3a_", free=("block_size", "block_size_pattern", "bias"))
def c3a(layer: Layer) -> Reading:
    """C3A."""
    block = layer.setting("block_size", "block_size_pattern")
    return Reading(call("c3a", block=block), layer.named(w="c3a_kernel"))
