"""One training step of a Llama shape on one device: Delta-LoRA by `surgery`, beside what bounds it and what people use.

    floor     the frozen model, forward and backward to the embeddings only: what no adapter can be faster than
    peft      LoRA on the same linears, adapters in float32 (its default) and in the model's dtype
    surgery   Delta-LoRA on the same linears, from the spec below

each eager and compiled, same model, same tokens, one after another in one process. Prints a table: median and smallest
step time, peak memory, seconds until the first step is done (capture and compilation included), and the last loss. The
defaults suit an H200: 2048 x 16 layers, 4 x 2048 tokens, bfloat16.

    python tests/benchmarks/step_on_gpu.py
    python tests/benchmarks/step_on_gpu.py --device cpu --hidden 64 --layers 2 --length 32 --steps 2
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import surgery

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY = 32000
RANK, ALPHA, RATE = 16, 32, 1e-4

SPEC = """
adapt model.layers.*.{{self_attn,mlp}}.*_proj {{
    with   delta_lora(rank = {rank}, alpha = {alpha}, ratio = 2.0, start = 1)
    expect {sites}
}}

step {{
    optimizer = adamw(lr = {rate})
    batch = {batch}   steps = 1000   loss = causal_lm   compile = {compile}
}}
"""


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    device: str
    dtype: torch.dtype
    hidden: int
    layers: int
    batch: int
    length: int

    def model(self) -> Any:
        """The model with random weights, frozen, in training mode, on the device."""
        config = AutoConfig.for_model(
            "llama",
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64 or 1,
            num_key_value_heads=self.hidden // 256 or 1,
            head_dim=min(64, self.hidden),
            vocab_size=VOCABULARY,
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
        return torch.randint(0, VOCABULARY, (self.batch, self.length), generator=generator).to(self.device)


@dataclass(frozen=True)
class Row:
    """A line of the table; times in milliseconds, memory in GiB."""

    name: str
    median: float
    smallest: float
    peak: float
    first: float
    loss: float


Arm = Callable[[Shape, bool], Callable[[Tensor], Tensor]]


def causal_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next token, in float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def floor(shape: Shape, compiled: bool) -> Callable[[Tensor], Tensor]:
    """The frozen model, with a gradient to its input embeddings and no further."""
    model = shape.model()
    embedding = model.get_input_embeddings()
    forward = torch.compile(model) if compiled else model

    def step(tokens: Tensor) -> Tensor:
        embedded = embedding(tokens).requires_grad_()
        loss = causal_loss(forward(inputs_embeds=embedded, use_cache=False).logits, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def peft_with(adapters_in_float32: bool) -> Arm:
    """LoRA by peft, one AdamW step."""

    def arm(shape: Shape, compiled: bool) -> Callable[[Tensor], Tensor]:
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(LINEARS))
        model = peft.get_peft_model(shape.model(), config, autocast_adapter_dtype=adapters_in_float32).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, fused=shape.device != "cpu")
        forward: Any = torch.compile(model) if compiled else model

        def step(tokens: Tensor) -> Tensor:
            loss = causal_loss(forward(input_ids=tokens, use_cache=False).logits, tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    return arm


def delta_lora(shape: Shape, compiled: bool) -> Callable[[Tensor], Tensor]:
    """The compiled program; its step runs the optimizer and the events."""
    spec = SPEC.format(
        rank=RANK,
        alpha=ALPHA,
        rate=RATE,
        batch=shape.batch,
        sites=len(LINEARS) * shape.layers,
        compile="on" if compiled else "off",
    )
    example = {"input_ids": shape.tokens()}
    training = surgery.compile(surgery.parse(spec), model=shape.model(), example_inputs=example, device=shape.device)

    def step(tokens: Tensor) -> Tensor:
        loss: Tensor = training({"input_ids": tokens, "labels": tokens}).loss
        return loss

    return step


def measure(name: str, arm: Arm, shape: Shape, compiled: bool, steps: int, warm: int) -> Row:
    """Build an arm, run it, and give its memory back."""
    cuda = shape.device != "cpu"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    tokens, times, loss, first = shape.tokens(), [], torch.zeros(()), 0.0
    begin = time.perf_counter()
    step = arm(shape, compiled)
    for number in range(warm + steps):
        start = time.perf_counter()
        loss = step(tokens)
        if cuda:
            torch.cuda.synchronize()
        end = time.perf_counter()
        if number == 0:
            first = end - begin
        if number >= warm:
            times.append(1e3 * (end - start))
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    row = Row(name, statistics.median(times), min(times), peak, first, float(loss))
    del step
    gc.collect()
    torch._dynamo.reset()
    if cuda:
        torch.cuda.empty_cache()
    return row


def arms() -> Iterator[tuple[str, str, Arm]]:
    """Group, name and builder of every arm that can run here."""
    yield "floor", "frozen model, gradient to the input", floor
    if importlib.util.find_spec("peft") is not None:
        yield "peft", "peft LoRA, float32 adapters", peft_with(True)
        yield "peft", "peft LoRA, adapters in the model's dtype", peft_with(False)
    yield "surgery", "surgery Delta-LoRA", delta_lora


def main() -> None:
    """Measure the chosen arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--arms", default="floor,peft,surgery", help="groups, separated by commas")
    parser.add_argument("--modes", default="eager,compiled")
    chosen = parser.parse_args()
    dtype = getattr(torch, chosen.dtype)
    shape = Shape(chosen.device, dtype, chosen.hidden, chosen.layers, chosen.batch, chosen.length)
    where = torch.cuda.get_device_name() if chosen.device != "cpu" else "CPU"
    print(f"torch {torch.__version__}, {where}, {shape}")
    print(f"{'':52s} {'median ms':>10s} {'min ms':>10s} {'peak GiB':>9s} {'first s':>8s} {'loss':>8s}")
    for group, name, arm in arms():
        for mode in chosen.modes.split(","):
            if group not in chosen.arms.split(","):
                continue
            try:
                row = measure(f"{name}, {mode}", arm, shape, mode == "compiled", chosen.steps, chosen.warm)
            except Exception as error:  # one arm that cannot run must not take the others with it
                print(f"{f'{name}, {mode}':52s} failed: {type(error).__name__}: {str(error).strip()[:300]}", flush=True)
                continue
            numbers = f"{row.median:10.2f} {row.smallest:10.2f} {row.peak:9.2f} {row.first:8.1f} {row.loss:8.4f}"
            print(f"{row.name:52s} {numbers}", flush=True)


if __name__ == "__main__":
    main()
