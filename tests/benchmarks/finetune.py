"""Fine-tuning on conversations at the size that people do it, beside peft with `transformers.Trainer`.

The shape is Llama-3.2-1B's with its vocabulary of 128,256, with random weights; the conversations are GSM8K's and
Dolly's, packed into 4 rows of 2048 tokens per step, of which the answers are learnt; LoRA on all linears, rank 16. All
arms have the same weights, adapters to begin with, batches, optimizer, rate and clipping. Times are from the end of one
step to the end of the next, data included.

    surgery               the run of `surgery train`: recompute = blocks, compiled
    surgery, all kept     the same without recompute
    surgery, eager        the first with compile = off
    peft                  as documented: float32 adapters under bfloat16 autocast, gradient checkpointing
    peft, bf16 adapters   no autocast: faster, and Adam's steps are rounded to bfloat16
    ..., with Liger       both with Liger's kernels, whose loss never holds all logits; left out where there are none

    python -m tests.benchmarks.finetune --data DIR --json FILE
    python -m tests.benchmarks.finetune --data DIR --tiny
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import surgery
from surgery.runtime.data import Data, Stream, load_data
from surgery.runtime.models import load_tokenizer
from surgery.runtime.train import train
from tests.benchmarks.arms import LINEARS
from tests.benchmarks.measuring import HEAD, Ratio, Row, free, line, machine, synchronize, write
from tests.benchmarks.texts import write_chats

TOKENIZER = Path(__file__).resolve().parents[2] / "specs" / "data" / "tokenizer"
CARD = 24e9 / 2**30  # GiB of a card of 24 GB

LLAMA_1B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "use_cache": False, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
TINY = {
    **LLAMA_1B, "vocab_size": 1100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip

SPEC = """
model config "llama.json" {{ task = causal_lm  dtype = {dtype}  tokenizer = "{tokenizer}" }}
adapt model.layers.*.{{self_attn,mlp}}.*_proj {{ with lora(rank = {rank}, alpha = {alpha})  expect {sites} }}
data "chats.jsonl" {{
    messages = messages   template = chatml   loss = assistant
    max_length = {length}   too_long = drop   pack = true
}}
step {{
    optimizer = adamw(lr = {rate})   batch = {batch}   steps = {steps}   clip = 1.0   seed = 0
    {settings}
}}
"""


@dataclass(frozen=True)
class Run(Row):
    """An arm's row, its loss the mean of the last five; `reserved` is what the allocator held, in GiB."""

    reserved: float
    losses: tuple[float, ...]


@dataclass
class Setup:
    """What all arms share; the first of surgery's says what the adapters and the batches are."""

    folder: Path
    device: str
    dtype: torch.dtype
    config: dict[str, Any]
    steps: int
    warm: int
    batch: int
    length: int
    rank: int
    rate: float
    data: Data | None = None
    adapters: dict[str, Tensor] = field(default_factory=dict)  # A of every site, by its path

    def model(self) -> Any:
        """The shape with random weights, on the device, frozen; the same for every arm."""
        config = AutoConfig.for_model(**self.config)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        return model.requires_grad_(False)

    def spec(self, settings: str) -> str:
        """The program of one of surgery's arms."""
        return SPEC.format(
            dtype=str(self.dtype).removeprefix("torch."), tokenizer=TOKENIZER, rank=self.rank, alpha=2 * self.rank,
            sites=7 * self.config["num_hidden_layers"], length=self.length, rate=self.rate, batch=self.batch,
            steps=self.steps, settings=settings,
        )  # fmt: skip

    def row(self, name: str, seconds: list[float], losses: list[float], build: float) -> Run:
        """An arm's figures, of the seconds and the loss of every step."""
        times = [1e3 * value for value in seconds[self.warm :]]
        peak = reserved = float("nan")
        if self.device != "cpu":
            peak, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        final = statistics.mean(losses[-5:])
        return Run(name, statistics.median(times), min(times), peak, build, seconds[0], final, reserved, tuple(losses))


# --- arms -------------------------------------------------------------------------------------------------------------


def surgery_run(setup: Setup, name: str, settings: str) -> Run:
    """The run of `surgery train`: the spec's data, its step, the loop with a run folder."""
    spec = setup.folder / "sft.surg"
    spec.write_text(setup.spec(settings), encoding="utf-8")
    program = surgery.parse(spec)
    if setup.data is None:
        plan = surgery.plan(program)
        setup.data = load_data(plan, program.folder, load_tokenizer(plan.model, program.folder))
        print(setup.data.summary(), flush=True)
        if setup.steps * setup.batch > len(setup.data.train):
            raise SystemExit(f"{setup.steps} steps need {setup.steps * setup.batch} packed rows: give more --rows")
    began = time.perf_counter()
    step = surgery.compile(program, model=setup.model(), device=setup.device)
    build = time.perf_counter() - began
    step.steps = setup.steps
    if not setup.adapters:
        setup.adapters = {
            path: found["A"].detach().to("cpu", copy=True) for path, found in step.parameters_by_site.items()
        }
    run = setup.folder / name.replace(" ", "_").replace(",", "")
    train(step, setup.data, run, progress=False)
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    return setup.row(name, [row["seconds"] for row in rows], [row["loss"] for row in rows], build)


class Timed(TrainerCallback):
    """The seconds of every step: from the end of the one before it."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self.ended = device, list[float](), 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first step's begin."""
        synchronize(self.device)
        self.ended = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step's end."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self.ended)
        self.ended = now


class Recorded(Trainer):
    """Batches in their order; `losses` has one of each step."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.losses: list[Tensor] = []

    def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """A step's loss, which is kept."""
        loss: Tensor = super().training_step(*arguments, **named)
        self.losses.append(loss.detach())
        return loss


def peft_run(setup: Setup, name: str, wide: bool, liger: bool) -> Run:
    """peft and Trainer on the same batches; `wide`: float32 adapters and autocast."""
    import peft

    if setup.data is None:
        raise RuntimeError("it takes its batches and its adapters from an arm of surgery")
    began = time.perf_counter()
    config = peft.LoraConfig(
        r=setup.rank, lora_alpha=2 * setup.rank, lora_dropout=0.0, target_modules=list(LINEARS), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(setup.model(), config, autocast_adapter_dtype=wide)
    with torch.no_grad():
        for path, value in setup.adapters.items():
            model.get_parameter(f"base_model.model.{path}.lora_A.default.weight").copy_(value)
    stream = Stream(setup.data.train, setup.batch, seed=0)
    timed = Timed(setup.device)
    arguments = TrainingArguments(
        output_dir=str(setup.folder / "peft"), max_steps=setup.steps, per_device_train_batch_size=1,
        learning_rate=setup.rate, weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type="constant",
        optim="adamw_torch" if setup.device == "cpu" else "adamw_torch_fused",
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=wide and setup.dtype == torch.bfloat16, use_liger_kernel=liger, use_cpu=setup.device == "cpu",
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, seed=0,
    )  # fmt: skip
    trainer = Recorded(
        model=model, args=arguments, train_dataset=[stream.batch(number) for number in range(setup.steps)],
        data_collator=lambda batches: batches[0], callbacks=[timed],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    build = time.perf_counter() - began
    trainer.train()
    return setup.row(name, timed.seconds, torch.stack(trainer.losses).tolist(), build)


def arms(setup: Setup) -> dict[str, Callable[[str], Run]]:
    """Every arm by its name. Liger's come last: it changes transformers' own functions."""
    with_liger = setup.device != "cpu" and importlib.util.find_spec("liger_kernel") is not None
    found: dict[str, Callable[[str], Run]] = {
        "surgery": partial(surgery_run, setup, settings="recompute = blocks"),
        "surgery, all kept": partial(surgery_run, setup, settings="recompute = none"),
        "surgery, eager": partial(surgery_run, setup, settings="recompute = blocks  compile = off"),
    }
    for liger in (False, True) if with_liger else (False,):
        ending = ", with Liger" if liger else ""
        found[f"peft{ending}"] = partial(peft_run, setup, wide=True, liger=liger)
        found[f"peft, bf16 adapters{ending}"] = partial(peft_run, setup, wide=False, liger=liger)
    return found


def compare(rows: dict[str, Run]) -> list[Ratio]:
    """What was to be reached, of the arms that ran; memory only where it was measured."""
    if "surgery" not in rows:
        return []
    ours = rows["surgery"]
    found = [Ratio("surgery: GiB of the card in use, at the peak", ours.reserved, CARD)]
    for row in (row for name, row in rows.items() if name.startswith("peft")):
        apart = max(abs(mine - other) for mine, other in zip(ours.losses, row.losses, strict=True))
        found += [
            Ratio(f"step over that of {row.name}", ours.median / row.median, 1.0),
            Ratio(f"peak memory over that of {row.name}", ours.peak / row.peak, 1.0),
            Ratio(f"largest difference of a step's loss, {row.name}", apart, 0.05),
        ]
    return [ratio for ratio in found if not math.isnan(ratio.value)]


def main() -> None:
    """Run the chosen arms one after the other, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds gsm8k/ and dolly_3k/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64, to see that it works")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, default=2000, help="conversations that are read")
    parser.add_argument("--arms", nargs="+", help="parts of the names of those that run; left out: all")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    about, rows = machine(chosen.device), dict[str, Run]()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    with tempfile.TemporaryDirectory() as name:
        setup = Setup(Path(name), chosen.device, torch.bfloat16, LLAMA_1B, chosen.steps, 4, 4, 2048, 16, 1e-3)
        if chosen.tiny:
            setup = Setup(Path(name), chosen.device, torch.float32, TINY, chosen.steps, 4, 4, 512, 4, 1e-2)
        (setup.folder / "llama.json").write_text(json.dumps(setup.config), encoding="utf-8")
        write_chats(chosen.data, setup.folder / "chats.jsonl", chosen.rows)
        print(f"{HEAD} {'held GiB':>9s} {'first loss':>10s}")
        for arm, run in arms(setup).items():
            if chosen.arms and arm != "surgery" and not any(part in arm for part in chosen.arms):
                continue
            free(setup.device)
            if setup.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
                if (left := torch.cuda.memory_allocated() / 2**30) > 0.1:
                    print(f"{left:.2f} GiB of earlier arms are still held", flush=True)
            try:
                rows[arm] = run(arm)
            except Exception as error:  # one arm does not take the others with it
                print(f"{arm:58s} failed: {type(error).__name__}: {str(error).strip()[:300]}", flush=True)
                continue
            print(f"{line(rows[arm])} {rows[arm].reserved:9.2f} {rows[arm].losses[0]:10.4f}", flush=True)
    ratios = compare(rows)
    print(f"\n{'':58s} {'reached':>10s} {'target':>9s}")
    for ratio in ratios:
        print(f"{ratio.what:58s} {ratio.value:10.3f} {ratio.target:9.2f}{'' if ratio.met else '  missed'}")
    if chosen.json:
        write(chosen.json, {**about, "config": setup.config, "steps": setup.steps}, list(rows.values()), ratios)


if __name__ == "__main__":
    main()
