"""E2E NLG in the LoRA papers' files: LoRA, Delta-LoRA, and LoRA at the scale that Delta-LoRA ends at, by BLEU.

A decoder is pretrained here on Tiny Shakespeare, Dolly and GSM8K, and saved; each run adapts that folder to restaurants
(`name : The Punter | Type : pub||The Punter is a pub .`), of which the text behind `||` is learnt, and writes one for
each of the 630 meaning representations of the test set. BLEU is sacrebleu's, against all references of a meaning
representation at once, in lower case, as the papers' script has it.

Delta-LoRA adds to W `ratio` times what its low-rank product changes by, so that after its start the change of W is
(1 + ratio) times LoRA's of the same factors: the third method is LoRA with that alpha. Its start, 500 of the papers'
26,000 steps, is the same share of these.

    python -m tests.benchmarks.e2e --data DIR --json FILE
    python -m tests.benchmarks.e2e --data DIR --tiny
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pickle
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import surgery
from surgery.runtime.data import load_data
from surgery.runtime.models import load_tokenizer
from surgery.runtime.train import train
from tests.benchmarks.measuring import machine
from tests.benchmarks.texts import documents, grouped, restaurants

END = "<|endoftext|>"
SITES = "model.layers.*.{self_attn,mlp}.*_proj"

SPEC = """
model "{folder}/model" {{ task = causal_lm  dtype = float32 }}
adapt {sites} {{ with {method} }}
data "{folder}/train.jsonl" {{ prompt = "{{mr}} ||"  completion = " {{text}}"  max_length = {length}  pack = true }}
step {{
    optimizer = adamw(lr = {rate}, weight_decay = 0.01)   schedule = linear(warmup = 0.02)
    batch = {batch}   steps = {steps}   clip = 1.0   seed = {seed}   compile = {compile}
}}
"""


@dataclass(frozen=True)
class Setting:
    """What every run shares; `folder` holds the pretrained model, the rows, and the packed data."""

    folder: str
    device: str
    steps: int
    batch: int  # packed rows of `length` tokens
    length: int
    rate: float
    rank: int
    alpha: float
    ratio: float
    sites: str
    compile: str
    beams: int
    new_tokens: int

    def methods(self) -> dict[str, str]:
        """What is compared, by its name."""
        rank, alpha, ratio = self.rank, self.alpha, self.ratio
        start, scaled = round(self.steps * 500 / 26_290), (1 + ratio) * alpha
        return {
            f"LoRA, alpha {alpha:g}": f"lora(rank = {rank}, alpha = {alpha})",
            f"Delta-LoRA, ratio {ratio:g}": (
                f"delta_lora(rank = {rank}, alpha = {alpha}, ratio = {ratio}, start = {start})"
            ),
            f"LoRA, alpha {scaled:g}": f"lora(rank = {rank}, alpha = {scaled})",
        }

    def spec(self, method: str, seed: int) -> str:
        """The program of a run."""
        return SPEC.format(
            folder=self.folder, method=method, seed=seed, sites=self.sites, length=self.length,
            rate=self.rate, batch=self.batch, steps=self.steps, compile=self.compile,
        )  # fmt: skip


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU in 0..100 against several references each."""
    most = max(map(len, references))
    streams = [[row[place] if place < len(row) else None for row in references] for place in range(most)]
    sacrebleu: Any = importlib.import_module("sacrebleu")  # needed by this measurement alone
    # `force`: the set is written tokenized, which sacrebleu would warn of
    return float(sacrebleu.corpus_bleu(list(texts), streams, lowercase=True, force=True).score)


# --- pretraining ------------------------------------------------------------------------------------------------------


def pretrain(chosen: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Train a tokenizer and a decoder on the other texts, save both as one model folder; the losses on the way."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = documents(chosen.data)
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=chosen.vocabulary, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    pieces.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token=END, pad_token=END)
    ids = [token for row in tokenizer(texts)["input_ids"] for token in [*row, tokenizer.eos_token_id]]
    length, size = chosen.context, len(ids) // chosen.context
    held, rows = torch.tensor(ids[: size * length]).view(size, length).to(chosen.device).tensor_split([16])

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=chosen.width, intermediate_size=8 * chosen.width // 3 // 64 * 64,
        num_hidden_layers=chosen.layers, num_attention_heads=chosen.width // 64,
        num_key_value_heads=chosen.width // 64, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).to(chosen.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    steps = chosen.pretraining
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
    )

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=chosen.device != "cpu"):
            logits = model(batch, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())

    began, order, losses = time.perf_counter(), torch.empty(0, dtype=torch.long), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        if len(order) < chosen.pretraining_batch:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        taken, order = order[: chosen.pretraining_batch], order[chosen.pretraining_batch :]
        loss = loss_of(rows[taken.to(rows.device)])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    with torch.no_grad():
        final = float(loss_of(held))
    seconds = time.perf_counter() - began
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {"parameters": model.num_parameters(), "tokens": float(rows.numel()), "first": float(losses[0]),
            "last": float(torch.stack(losses[-20:]).mean()), "held out": final, "seconds": seconds}  # fmt: skip


# --- runs -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def written(model: Any, tokenizer: Any, meanings: Sequence[str], setting: Setting) -> list[str]:
    """A text for each meaning representation, the likeliest by greedy choice or beam search."""
    tokenizer.padding_side = "left"
    size, found = max(1, 1024 // setting.beams), []
    for start in range(0, len(meanings), size):
        asked = tokenizer([f"{meaning} ||" for meaning in meanings[start : start + size]], padding=True)
        ids, mask = (torch.tensor(asked[name], device=model.device) for name in ("input_ids", "attention_mask"))
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=setting.new_tokens, do_sample=False, num_beams=setting.beams,
            use_cache=True, length_penalty=0.8 if setting.beams > 1 else 1.0, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        found += [" ".join(text.split()) for text in texts]
    return found


def run(job: tuple[Setting, str, str, int, dict[str, list[str]]]) -> dict[str, Any]:
    """Adapt once and score what the merged model writes."""
    setting, name, method, seed, tests = job
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    program = surgery.parse(setting.spec(method, seed), name=name)
    with open(Path(setting.folder) / "data.pickle", "rb") as file:
        data = pickle.load(file)
    step = surgery.compile(program, device=setting.device)
    step.steps = setting.steps
    folder = Path(setting.folder) / f"{name}-{seed}"
    outcome = train(step, data, folder, progress=False)
    losses = [json.loads(row)["loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()]
    began = time.perf_counter()
    tokenizer = load_tokenizer(step.plan.model, Path(setting.folder))
    texts = written(step.merge().to(setting.device).eval(), tokenizer, list(tests), setting)
    samples = list(zip(list(tests), texts, strict=True))[:: max(1, len(tests) // 3)][:3]
    return {"name": name, "method": method, "seed": seed, "bleu": bleu(texts, list(tests.values())),
            "loss": statistics.mean(losses[-20:]), "trained": step.plan.totals.trainable, "samples": samples,
            "seconds": outcome.seconds, "writing": time.perf_counter() - began}  # fmt: skip


def prepare(setting: Setting, chosen: argparse.Namespace) -> None:
    """The rows to learn as a file, and the data that the runs' specs read from it, once for all."""
    rows = restaurants(chosen.data, "train")[: chosen.rows]
    texts = (json.dumps({"mr": meaning, "text": text}) + "\n" for meaning, text in rows)
    (Path(setting.folder) / "train.jsonl").write_text("".join(texts), encoding="utf-8")
    plan = surgery.plan(surgery.parse(setting.spec("lora()", 0)))
    data = load_data(plan, Path(), load_tokenizer(plan.model, Path()))
    print(data.summary(), flush=True)
    (Path(setting.folder) / "data.pickle").write_bytes(pickle.dumps(data))


def table(found: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per method: mean and standard deviation of BLEU over the seeds."""
    rows = []
    for name in names:
        runs = sorted((run for run in found if run["name"] == name), key=lambda run: run["seed"])
        if not runs:
            continue
        scores, losses = [run["bleu"] for run in runs], [run["loss"] for run in runs]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        rows.append({"name": name, "method": runs[0]["method"], "trained": runs[0]["trained"],
                     "bleu": statistics.mean(scores), "spread": spread, "scores": scores,
                     "loss": statistics.mean(losses), "seconds": statistics.mean(run["seconds"] for run in runs),
                     "writing": statistics.mean(run["writing"] for run in runs)})  # fmt: skip
    return rows


def main() -> None:
    """Pretrain, adapt with every method and seed, print the table and three texts of each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds e2e_lora_format/ and the other sets' folders")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 128 and few rows, for a CPU")
    parser.add_argument("--json", type=Path)
    for name, value in {
        "layers": 8, "width": 512, "vocabulary": 8192, "context": 512, "pretraining": 1000, "pretraining-batch": 32,
        "steps": 1000, "batch": 8, "length": 512, "rank": 16, "seeds": 3, "rows": 42061, "tests": 630, "beams": 1,
        "new-tokens": 96, "workers": 9,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, number in {"rate": 2e-3, "alpha": 32.0, "ratio": 2.0}.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument("--sites", default=SITES, help="the pattern that is adapted")
    parser.add_argument("--only", nargs="+", help="names of the methods that run; left out: all")
    parser.add_argument("--compile", default="off", help="`compile` of the runs' specs")
    if parser.parse_known_args()[0].tiny:
        parser.set_defaults(layers=2, width=128, vocabulary=2048, context=128, pretraining=150, pretraining_batch=16,
                            steps=60, length=128, seeds=1, rows=2000, tests=12, new_tokens=48, workers=1)  # fmt: skip
    chosen = parser.parse_args()
    importlib.import_module("sacrebleu")  # says that it is not there before anything takes time
    torch.set_float32_matmul_precision("high")
    about = machine(chosen.device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    found: list[dict[str, Any]] = []
    tests = dict(list(grouped(restaurants(chosen.data, "test")).items())[: chosen.tests])
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(chosen.workers, mp_context=context) as pool:
        setting = Setting(
            name, chosen.device, chosen.steps, chosen.batch, chosen.length, chosen.rate, chosen.rank, chosen.alpha,
            chosen.ratio, chosen.sites, chosen.compile, chosen.beams, chosen.new_tokens,
        )  # fmt: skip
        for _ in range(chosen.workers):  # they start and import while the decoder is pretrained
            pool.submit(importlib.import_module, "surgery.runtime.step")
        pretrained = pretrain(chosen, Path(name))
        print("pretraining: " + ", ".join(f"{what} {value:,.6g}" for what, value in pretrained.items()), flush=True)
        prepare(setting, chosen)
        methods = {name: method for name, method in setting.methods().items() if not chosen.only or name in chosen.only}
        waiting = {pool.submit(run, (setting, name, method, seed, tests)): (name, seed)
                   for name, method in methods.items() for seed in range(chosen.seeds)}  # fmt: skip
        for future in as_completed(waiting):
            name, seed = waiting[future]
            try:
                found.append(future.result())
                print(f"{name}, seed {seed}: BLEU {found[-1]['bleu']:.2f}", flush=True)
            except Exception as error:  # one run does not take the others with it
                print(f"{name}, seed {seed} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
    rows = table(found, list(methods))
    print(f"{'method':24} {'trained':>9} {'BLEU':>7} {'spread':>7} {'loss':>8} {'s':>6} {'writing s':>9}  of each seed")
    for row in rows:
        scores = ", ".join(f"{score:.2f}" for score in row["scores"])
        print(f"{row['name']:24} {row['trained']:>9,} {row['bleu']:>7.2f} {row['spread']:>7.2f} {row['loss']:>8.4f} "
              f"{row['seconds']:>6.1f} {row['writing']:>9.1f}  {scores}")  # fmt: skip
    for result in found:
        for meaning, text in result["samples"] if result["seed"] == 0 else ():
            print(f"\n{result['name']}: {meaning}\n  {text}")
    if chosen.json:
        about |= {"settings": {key: str(value) for key, value in vars(chosen).items()}}  # type: ignore[dict-item]
        chosen.json.write_text(json.dumps({**about, "pretraining": pretrained, "rows": rows, "runs": found}, indent=1))


if __name__ == "__main__":
    main()
