"""Arms of the benchmarks: each builds a model of its own and gives its training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import surgery
from surgery.compiler import p5_capture, p8_optimize
from surgery.compiler.emit.forward import forward_source
from surgery.compiler.graph import tensors
from tests.benchmarks.measuring import Step

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL = "model.layers.*.{self_attn,mlp}.*_proj"
SQUARE = "model.layers.*.self_attn.{q,o}_proj"
RATE = 1e-4


@dataclass(frozen=True)
class Llama:
    """A Llama shape with random weights, and the batch that its step takes."""

    device: str
    dtype: torch.dtype = torch.bfloat16
    hidden: int = 2048
    layers: int = 16
    batch: int = 4
    length: int = 2048
    rank: int = 16
    vocabulary: int = 32000

    def model(self) -> Any:
        """Frozen, in training mode, on the device."""
        heads = max(1, self.hidden // 64)
        config = AutoConfig.for_model(
            "llama",
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            head_dim=min(64, self.hidden),
            vocab_size=self.vocabulary,
            max_position_embeddings=max(4096, self.length),
            rope_theta=500000.0,
            use_cache=False,
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        return model.train().requires_grad_(False)

    def tokens(self) -> Tensor:
        """Random tokens `[batch, length]`, the same for every arm."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.vocabulary, (self.batch, self.length), generator=generator).to(self.device)


def causal_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next token, in float32, over whole logits."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def frozen_model(shape: Llama) -> Step:
    """The Hugging Face model as it is, with a gradient to its input embeddings and no further."""
    model, tokens = shape.model(), shape.tokens()
    embedding = model.get_input_embeddings()

    def step() -> Tensor:
        embedded = embedding(tokens).requires_grad_()
        loss = causal_loss(model(inputs_embeds=embedded, use_cache=False).logits, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def frozen_graph(shape: Llama, compiled: bool, optimized: bool = False) -> Step:
    """The floor: the captured graph without an adapter, with a gradient to its embeddings and no further.

    `compiled` block by block, each for its own sizes; `optimized` by the passes that an adapted graph goes through.
    """
    model, tokens = shape.model(), shape.tokens()
    graph = p5_capture.run(model, {"input_ids": tokens[:, :64]}, "causal_lm")
    graph = p8_optimize.run(graph) if optimized else graph
    found = forward_source(graph)
    lookup = 'F.embedding(input_ids, weights["model.embed_tokens.weight"])'
    assert lookup in found.source
    namespace: dict[str, Any] = {}
    head = "import torch\nimport torch.nn.functional as F\nfrom torch import Tensor\nWeights = dict\n"
    exec(head + found.source.replace(lookup, f"{lookup}.requires_grad_()"), namespace)
    for name in found.block_functions if compiled else ():
        namespace[name] = torch.compile(namespace[name], dynamic=False)
    weights = tensors(graph.module)

    def step() -> Tensor:
        loss = causal_loss(namespace["forward"](weights, tokens), tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def peft_lora(shape: Llama, compiled: bool, adapters_in_float32: bool, **options: Any) -> Step:
    """LoRA by peft (`options` such as `use_dora`), one AdamW step."""
    import peft

    config = peft.LoraConfig(
        r=shape.rank, lora_alpha=2 * shape.rank, lora_dropout=0.0, target_modules=list(LINEARS), **options
    )
    return _llama_step(shape, peft.get_peft_model(shape.model(), config, autocast_adapter_dtype=adapters_in_float32),
                       compiled)  # fmt: skip


def peft_c3a(shape: Llama) -> Step:
    """Circulant updates of the square projections by peft."""
    import peft

    config = peft.C3AConfig(target_modules=["q_proj", "o_proj"], block_size=shape.hidden)
    return _llama_step(shape, peft.get_peft_model(shape.model(), config), compiled=False)


def _llama_step(shape: Llama, model: Any, compiled: bool) -> Step:
    tokens = shape.tokens()
    forward: Any = torch.compile(model) if compiled else model
    return _adamw_step(
        model, lambda: causal_loss(forward(input_ids=tokens, use_cache=False).logits, tokens), shape.device
    )


def _adamw_step(model: nn.Module, loss_of: Callable[[], Tensor], device: str) -> Step:
    """Forward, backward and AdamW on what of the model requires gradients."""
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=device != "cpu")

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def ours(shape: Llama, method: str, settings: str, pattern: str = ALL, rule: str = "") -> Step:
    """A compiled program: the forward, the backward, the optimizer and the events of its step."""
    spec = f"""
        adapt {pattern} {{ with {method} {rule} }}
        step {{ optimizer = adamw(lr = {RATE})  batch = {shape.batch}  steps = 1000  loss = causal_lm  {settings} }}
    """
    tokens = shape.tokens()
    training = surgery.compile(
        surgery.parse(spec), model=shape.model(), example_inputs={"input_ids": tokens}, device=shape.device
    )

    def step() -> Tensor:
        loss: Tensor = training({"input_ids": tokens, "labels": tokens}).loss
        return loss

    return step


# --- a stack of sparse linears ----------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Linear layers one behind the other, half of each weight zero, behind a trained scale that wants a gradient."""

    def __init__(self, width: int, layers: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: Any = {"device": device, "dtype": dtype}
        self.scale = nn.Parameter(torch.ones(width, **options))
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False, **options) for _ in range(layers))
        with torch.no_grad():
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                weight = torch.randn(width, width, **options) * (2 / width) ** 0.5
                layer.weight.copy_(weight * (torch.rand(width, width, device=device) < 0.5))
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """The mean of the last layer's output, 0-d."""
        hidden = input * self.scale
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.mean()


@dataclass(frozen=True)
class StackShape:
    """Eight layers of 4096 x 4096 over 8192 rows, unless said otherwise."""

    device: str
    dtype: torch.dtype = torch.bfloat16
    width: int = 4096
    layers: int = 8
    rows: int = 8192

    def model(self) -> Stack:
        """The layers with random weights."""
        return Stack(self.width, self.layers, self.device, self.dtype)

    def input(self) -> Tensor:
        """Random rows `[rows, width]`."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.rows, self.width, generator=generator).to(self.device, self.dtype)


def frozen_stack(shape: StackShape) -> Step:
    """Forward and backward with a gradient to every layer's input."""
    model, input = shape.model(), shape.input()
    model.scale.requires_grad_()

    def step() -> Tensor:
        loss: Tensor = model(input)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def adapted_stack(shape: StackShape, method: str, settings: str) -> Step:
    """The same with every layer adapted and the optimizer's step behind it."""
    spec = f"""
        adapt layers.* {{ with {method} }}
        train scale
        step {{ optimizer = adamw(lr = {RATE})  batch = {shape.rows}  steps = 1000  loss = output  {settings} }}
    """
    batch = {"input": shape.input()}
    training = surgery.compile(
        surgery.parse(spec), model=shape.model(), example_inputs=batch, device=shape.device, calibration=[batch]
    )

    def step() -> Tensor:
        loss: Tensor = training(batch).loss
        return loss

    return step


# --- a small encoder --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """MiniLM's shape with random weights, as a classifier."""

    device: str
    batch: int = 32
    length: int = 64

    def model(self) -> Any:
        """In float32, in training mode, without dropout."""
        config = AutoConfig.for_model(
            "bert", hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=8,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        torch.manual_seed(0)
        model: Any = AutoModelForSequenceClassification.from_config(config)
        return model.to(self.device).train()

    def inputs(self) -> dict[str, Tensor]:
        """A batch of rows of unequal length, with labels."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(5, 30000, (self.batch, self.length), generator=generator)
        lengths = torch.randint(self.length // 2, self.length + 1, (self.batch, 1), generator=generator)
        mask = (torch.arange(self.length) < lengths).long()
        labels = torch.randint(0, 8, (self.batch,), generator=generator)
        return {name: value.to(self.device) for name, value in
                {"input_ids": tokens, "attention_mask": mask, "labels": labels}.items()}  # fmt: skip


def peft_encoder(shape: Encoder) -> Step:
    """LoRA on query and value by peft, the classifier trained, one AdamW step."""
    import peft

    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "value"]
    )
    model: Any = peft.get_peft_model(shape.model(), config)
    batch = shape.inputs()
    return _adamw_step(model, lambda: model(**batch).loss, shape.device)


def our_encoder(shape: Encoder, settings: str) -> Step:
    """The same as a program."""
    spec = f"""
        adapt bert.encoder.layer.*.attention.self.{{query,value}} {{ with lora(rank = 8, alpha = 16)  expect 12 }}
        train classifier
        step {{ optimizer = adamw(lr = {RATE})  batch = {shape.batch}  steps = 1000  loss = cross_entropy  {settings} }}
    """
    batch = shape.inputs()
    example = {name: value for name, value in batch.items() if name != "labels"}
    training = surgery.compile(surgery.parse(spec), model=shape.model(), example_inputs=example, device=shape.device)

    def step() -> Tensor:
        loss: Tensor = training(batch).loss
        return loss

    return step
