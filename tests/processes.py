"""Runs of `surgery train` over several processes, and the specs that the tests of them share."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import start_processes
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from surgery.cli import main
from surgery.runtime.step import TrainingStep
from tests.tokenizer import byte_level

Command = Sequence[str]

ROWS = 14  # to train on: the last batch of an epoch has 2, the longest row many times the tokens of the shortest
STEP = "optimizer = adamw(lr = 1e-2)  schedule = linear(warmup = 0.1)  clip = 1.0  seed = 3  log = every(1)"
DATA = 'prompt = "{question}"  completion = " {answer}"  loss = completion'
LINEAR = "model.layers.*.{self_attn,mlp}.*_proj"
LITERAL = "delta_lora(rank = 2, alpha = 4, ratio = 2.0, start = 1)  update = literal"


def spec(
    method: str, pattern: str = LINEAR, model: str = "llama", dtype: str = "float64", step: str = "batch = 4",
    data: str = "", more: str = "",
) -> str:  # fmt: skip
    """A spec for the folder of `save_folder`: 6 steps, two evaluations, a save after the third."""
    return f"""
model "{model}" {{ task = causal_lm  dtype = {dtype} }}
adapt {pattern} {{ with {method} }}
{more}
step {{ {STEP}  {step}  steps = 6  evaluate = every(3)  save = every(3, keep = 9) }}
data "rows.jsonl" {{ {DATA}  {data}  eval = "held_out.jsonl" }}
"""


def save_folder(folder: Path, dtype: torch.dtype = torch.float64) -> None:
    """Write `llama`, whose head is tied and sizes are odd, `gpt2` with transposed weights, `mixtral`, and rows."""
    tokenizer = byte_level()
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=12, intermediate_size=19, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        head_dim=6, vocab_size=len(tokenizer), max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    gpt2 = GPT2Config(
        n_embd=12, n_layer=2, n_head=3, n_positions=64, vocab_size=len(tokenizer), resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    mixtral = MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), num_local_experts=3, max_position_embeddings=64,
    )  # fmt: skip
    made: dict[str, Any] = {
        "llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2), "mixtral": MixtralForCausalLM(mixtral),
    }  # fmt: skip
    for name, model in made.items():
        model.to(dtype).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    rows = [
        {"question": " ".join(words[: 1 + n % 5]), "answer": " ".join(words[n % 7 : n % 7 + 1 + n % 4])}
        for n in range(ROWS + 3)
    ]
    for file, kept in (("rows.jsonl", rows[:ROWS]), ("held_out.jsonl", rows[ROWS:])):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in kept))


def run_together(folder: Path, commands: Sequence[Command], processes: int = 2, whole: Sequence[int] = ()) -> None:
    """Run `surgery COMMAND`s one after the other, each in all processes at once, as a launcher starts them.

    After the last step a process looks for tensors of the shape `whole` in its memory, and writes how many there are
    to `whole.PROCESS.json`, with the rows that it has of those that the step knows.
    """
    arguments = (processes, str(folder), [list(command) for command in commands], list(whole))
    multiprocessing.set_forkserver_preload([__name__])  # imported once for all processes
    start_processes(_work, args=arguments, nprocs=processes, start_method="forkserver")  # type: ignore[no-untyped-call]


def _work(number: int, processes: int, folder: str, commands: list[list[str]], whole: list[int]) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes)}
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    torch.set_num_threads(1)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(number)
        backend = "cpu:gloo,cuda:nccl"
    store = f"file://{folder}/meeting.{len(commands)}"
    distributed.init_process_group(backend, init_method=store, rank=number, world_size=processes)
    found: dict[str, list[int]] = {}
    if whole:
        _watch(tuple(whole), found)
    for command in commands:
        found.clear()
        try:
            main(command)
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"surgery {' '.join(command)} ended with {ended.code}") from None
        if whole:
            run = Path(command[command.index("-o") + 1] if "-o" in command else command[1])
            (run / f"whole.{number}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def _watch(shape: tuple[int, ...], found: dict[str, list[int]]) -> None:
    """After the last step, count the tensors of a shape that take memory."""
    take = TrainingStep.__call__

    def taken(self: TrainingStep, batch: Any) -> Any:
        result = take(self, batch)
        if self.step == self.steps:  # looking takes longer than the steps
            gc.collect()
            found["whole"] = [sum(_is_whole(one, shape) for one in gc.get_objects())]
        found["rows"] = [_rows(tensor) for tensor in self.weights.values() if tuple(tensor.shape) == shape]
        return result

    TrainingStep.__call__ = taken  # type: ignore[method-assign]


def _is_whole(one: object, shape: tuple[int, ...]) -> bool:
    if not isinstance(one, Tensor) or hasattr(one, "to_local") or tuple(one.shape) != shape:
        return False
    return one.untyped_storage().nbytes() > 0


def _rows(tensor: Tensor) -> int:
    return int(tensor.to_local().shape[0]) if hasattr(tensor, "to_local") else -1
