"""`rank = hidden_dimension_gain()`: what is measured, what of it a plan keeps, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import surgery
from surgery.analysis.intrinsic_dimension import intrinsic_dimension
from surgery.cli import main
from surgery.compiler import pipeline
from surgery.compiler.algebra.measured import gain
from surgery.compiler.plan import Plan
from surgery.peft.write import export
from surgery.runtime import distributed, measure
from tests.processes import run_together
from tests.project import save_project

WIDTH, ROWS = 16, 400
RULE = "adapt blocks.*.mix { with lora(rank = hidden_dimension_gain(), alpha = 8) }\n"
STEP = "step { optimizer = adamw(lr = 1e-3)  batch = 4  steps = 4  loss = mse  compile = off }\n"


class Block(nn.Module):
    """A matrix, and what it adds of other numbers of the row."""

    def __init__(self, weight: Tensor, added: Tensor) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mix.weight = nn.Parameter(weight)
        self.register_buffer("added", added)

    def forward(self, hidden: Tensor, more: Tensor) -> Tensor:
        """`[rows, 16]` from the same and `[rows, 6]`."""
        mixed: Tensor = self.mix(hidden)
        return mixed + more @ self.get_buffer("added")


class Known(nn.Module):
    """Rows of dimension 3, turned, widened by 6 dimensions, and cut to 2: what its three blocks do."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.start = nn.Parameter(drawn(3, WIDTH))
        cut = drawn(WIDTH, 2) @ drawn(2, WIDTH)
        nothing, wide = torch.zeros(6, WIDTH, dtype=torch.float64), drawn(6, WIDTH)
        turn = torch.linalg.qr(drawn(WIDTH, WIDTH)).Q
        self.blocks = nn.ModuleList([Block(turn, nothing), Block(torch.eye(WIDTH).double(), wide), Block(cut, nothing)])
        self.head = nn.Linear(WIDTH, 3).double()
        self.head.weight, self.head.bias = nn.Parameter(drawn(3, WIDTH)), nn.Parameter(drawn(3))

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, 9]` to `[rows, 3]`: the first three numbers are the rows', the others what is added."""
        hidden = x[:, :3] @ self.start
        for block in self.blocks:
            hidden = block(hidden, x[:, 3:])
        found: Tensor = self.head(hidden)
        return found


def batches(rows: int = ROWS, size: int = 90, seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows for `Known`, in batches of which the last is smaller."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 9, generator=generator, dtype=torch.float64)
    labels = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return [{"x": x[i : i + size], "labels": labels[i : i + size]} for i in range(0, rows, size)]


@pytest.fixture(autouse=True)
def few_rows_are_said_elsewhere() -> Iterator[None]:
    """These clouds are small; one test looks at the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="warning.SURG036")
        yield


def planned(rule: str = RULE, model: nn.Module | None = None, calibration: Any = None) -> Plan:
    return surgery.plan(surgery.parse(rule + STEP), model or Known(), calibration=calibration or batches())


def ranks(plan: Plan) -> dict[str, int | None]:
    return {site.path: site.rank for site in plan.sites}


def refusal(rule: str = RULE, model: nn.Module | None = None, calibration: Any = None) -> Any:
    """The one diagnostic that the plan ends with."""
    with pytest.raises(surgery.SurgError) as raised:
        planned(rule, model, calibration)
    (found,) = raised.value.diagnostics
    return found


# --- what is measured -------------------------------------------------------------------------------------------------


def hidden(model: Known, x: Tensor) -> list[Tensor]:
    """The hidden states between the blocks."""
    states = [x[:, :3] @ model.start]
    for block in model.blocks:
        states.append(states[-1] @ block.mix.weight.T + x[:, 3:] @ block.added)  # type: ignore[union-attr, operator]
    return [state.detach() for state in states]


@pytest.mark.parametrize("estimator", ["regression", "likelihood"])
def test_the_rank_is_the_gain_in_dimension(estimator: str) -> None:
    option = "" if estimator == "regression" else f'estimator = "{estimator}"'
    plan = planned(RULE.replace("gain()", f"gain({option})"))
    dimensions = [intrinsic_dimension(state, estimator)  # type: ignore[arg-type]
                  for state in hidden(Known(), torch.cat([batch["x"] for batch in batches()]))]  # fmt: skip
    (measured,) = plan.measured
    assert measured.rows == ROWS and measured.call == f"hidden_dimension_gain({option})"
    for block, (before, after) in enumerate(measured.blocks.values()):
        assert before == pytest.approx(dimensions[block], rel=1e-9)
        assert after == pytest.approx(dimensions[block + 1], rel=1e-9)
    assert dimensions[0] == pytest.approx(3, rel=0.15) and dimensions[3] == pytest.approx(2, rel=0.15)
    widened = gain(dimensions[1], dimensions[2])
    assert 4 <= widened <= 7
    # a turned cloud is as wide as before, and one that was cut is narrower: neither gains
    assert ranks(plan) == {"blocks.0.mix": 1, "blocks.1.mix": widened, "blocks.2.mix": 1}
    assert plan.totals.trainable == (1 + widened + 1) * 2 * WIDTH
    for site in plan.sites:
        assert [tensor.shape for tensor in site.tensors] == [(site.rank, WIDTH), (WIDTH, site.rank)]


def test_the_number_is_one_as_any_other() -> None:
    """In expressions, beside others, in a composition, as a default, for other parameters than a rank."""
    twice = "min(2 * hidden_dimension_gain(), 9) + 1"
    plan = planned(f"adapt blocks.*.mix {{ with lora(rank = {twice}, alpha = hidden_dimension_gain()) }}\n")
    plain = ranks(planned())
    assert ranks(plan) == {path: min(2 * (rank or 0), 9) + 1 for path, rank in plain.items()}
    assert [site.method for site in plan.sites] == [
        f"lora(rank = {site.rank}, alpha = {plain[site.path]}, dropout = 0)" for site in plan.sites
    ]
    composed = planned("adapt blocks.*.mix { with lora(rank = hidden_dimension_gain()) + 0.5 * lora(rank = 2) }\n")
    assert {site.path: site.tensors[0].shape[0] for site in composed.sites} == plain
    assert {site.tensors[2].shape[0] for site in composed.sites} == {2}
    own = (
        "method own(r: int = hidden_dimension_gain()) { A = train zeros[r, in]  B = train ones[out, r]  delta = B @ A }"
    )
    assert {
        site.path: site.tensors[0].shape[0] for site in planned(own + "\nadapt blocks.*.mix { with own() }\n").sites
    } == plain


def test_only_what_is_asked_for_is_measured() -> None:
    plan = planned(RULE.replace("blocks.*", "blocks.1"))
    assert list(plan.measured[0].blocks) == ["blocks.1"]
    assert ranks(plan) == {"blocks.1.mix": ranks(planned())["blocks.1.mix"]}
    without = surgery.plan(surgery.parse("adapt blocks.*.mix { with lora(rank = 2) }\n" + STEP), Known())
    assert without.measured == ()


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=60,
                        max_position_embeddings=32, initializer_range=0.3)  # fmt: skip
    return BertForSequenceClassification(config)


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=60, initializer_range=0.3)  # fmt: skip
    return LlamaForCausalLM(config)


def tokens(rows: int = 260, size: int = 70) -> list[dict[str, Tensor]]:
    """Rows of 3 to 12 tokens, padded on the right with different things."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for start in range(0, rows, size):
        count = min(size, rows - start)
        ids = torch.randint(3, 60, (count, 12), generator=generator)
        lengths = torch.randint(3, 13, (count,), generator=generator)
        mask = (torch.arange(12) < lengths[:, None]).long()
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 2})
    return found


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("make", [bert, llama])
def test_the_hidden_states_are_those_of_transformers(make: Any, pooling: str) -> None:
    """Without padding, and with what transformers itself gives for `output_hidden_states`."""
    model, rows = make().double(), tokens()
    states: list[list[Tensor]] = [[] for _ in range(4)]
    for batch in rows:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            given = model.eval()(**inputs, output_hidden_states=True).hidden_states
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            for place, state in enumerate(given):
                own = state[row, :length]
                states[place].append(own.mean(0) if pooling == "mean" else own[-1])
    kind = "**.self_attn.q_proj" if make is llama else "**.self.query"
    rule = f'adapt {kind} {{ with lora(rank = hidden_dimension_gain(pooling = "{pooling}")) }}\n'
    if make is llama:  # of the last block transformers gives what the norm makes of it
        rule = rule.replace("**", "model.layers.[0..1]")
    if pooling == "last" and make is llama:  # 57 embeddings end the rows
        rule = rule.replace("[0..1]", "1")
    labels = {"labels": rows[0]["input_ids"]} if make is llama else {}
    plan = surgery.plan(surgery.parse(rule), model, calibration=[{**batch, **labels} for batch in rows])
    for block, (before, after) in plan.measured[0].blocks.items():
        number = int(block.rpartition(".")[2])
        assert before == pytest.approx(intrinsic_dimension(torch.stack(states[number])), rel=1e-6)
        assert after == pytest.approx(intrinsic_dimension(torch.stack(states[number + 1])), rel=1e-6)
    assert all(site.rank == gain(*plan.measured[0].blocks[site.path.partition(".self")[0].removesuffix(".attention")])
               for site in plan.sites)  # fmt: skip


def test_rows_that_occur_again_count_once() -> None:
    """Also where they are padded to another length, which changes the last bits of what the model makes of them."""
    model, rows = bert(), tokens()
    longer = [{name: torch.nn.functional.pad(value, (0, 3)) if value.ndim > 1 else value
               for name, value in batch.items()} for batch in rows[:2]]  # fmt: skip
    program = surgery.parse("adapt **.self.query { with lora(rank = hidden_dimension_gain()) }")
    once, twice = (surgery.plan(program, model, calibration=given) for given in (rows, rows + longer + rows[:1]))
    assert twice.measured == once.measured and once.measured[0].rows == 260


def test_the_model_stays_as_it_is() -> None:
    model = bert().train()
    model.classifier.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learning = [parameter.requires_grad for parameter in model.parameters()]
    modes, config = [module.training for module in model.modules()], model.config.to_dict()
    random = torch.get_rng_state()
    surgery.plan(surgery.parse("adapt **.self.query { with gelora() }"), model, calibration=tokens())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert [module.training for module in model.modules()] == modes and model.config.to_dict() == config
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_dropout_is_off() -> None:
    model = bert().train()
    program = surgery.parse("adapt **.self.query { with gelora() }")
    trained, evaluated = (surgery.plan(program, one, calibration=tokens()) for one in (model, bert().eval()))
    assert trained.measured == evaluated.measured


def test_all_processes_have_the_numbers_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    own = planned()
    first = tuple(one.model_copy(update={"blocks": dict.fromkeys(one.blocks, (1.0, 3.0))}) for one in own.measured)
    monkeypatch.setattr(distributed, "gathered", lambda value: [first, value])
    assert set(ranks(planned()).values()) == {3} != set(ranks(own).values())


# --- what a plan keeps ------------------------------------------------------------------------------------------------


def compiled(model: nn.Module) -> Any:
    program = surgery.parse(RULE + STEP)
    return surgery.compile(program, model, {"x": batches()[0]["x"]}, calibration=batches())


def test_a_saved_run_needs_no_data(tmp_path: Path) -> None:
    step, batch = compiled(Known()), batches(8, 8)[0]
    assert ranks(step.plan) == ranks(planned())
    losses = [float(step(batch).loss) for _ in range(3)]
    assert losses[-1] < losses[0]
    step.save(tmp_path / "run")
    again = surgery.load(tmp_path / "run", Known(), example_inputs={"x": batch["x"]})
    assert again.plan.measured == step.plan.measured and again.source == step.source
    assert all(torch.equal(again.weights[name], value) for name, value in step.weights.items())
    assert float(again(batch).loss) == float(step(batch).loss)
    step.save(tmp_path / "run")
    adapted = surgery.apply(tmp_path / "run", Known())
    expected = step.forward(x=batch["x"])
    torch.testing.assert_close(adapted(batch["x"]), expected)
    torch.testing.assert_close(step.merge()(batch["x"]), expected)
    plan = Plan.model_validate_json((tmp_path / "run" / "plan.json").read_text())
    assert plan.measured == step.plan.measured


@pytest.mark.parametrize("own_ranks", [False, True])
def test_a_rank_of_each_block_is_exported(own_ranks: bool, tmp_path: Path) -> None:
    """To peft, padded to the largest one, or each as it is; alpha / rank is the same in all blocks."""
    model, rows = bert().double(), tokens()
    text = "adapt **.self.{query,value} { with gelora(scale = 2) }\nstep { optimizer = sgd(lr = 0.1)  steps = 2 }"
    known = surgery.plan(surgery.parse(text), model, numbers="draft").measured
    blocks = {path: (1.0, 1.0 + 2 * number) for number, path in enumerate(known[0].blocks)}
    wide = (known[0].model_copy(update={"rows": 999, "blocks": blocks}),)
    plan = surgery.plan(surgery.parse(text), model, numbers=wide)
    assert [site.rank for site in plan.sites] == [1, 1, 3, 3, 5, 5]
    assert plan.totals.trainable == 2 * (1 + 3 + 5) * (24 + 24)
    step = surgery.api._compile(surgery.parse(text), model, None, None, measured=wide, allow_code=False)
    inputs = {name: rows[0][name][:6] for name in ("input_ids", "attention_mask")}
    batch = {**inputs, "labels": rows[0]["labels"][:6]}
    step(batch)
    step(batch)
    export(step, tmp_path, tmp_path / "adapter", torch.float64, own_ranks=own_ranks)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    held = [tensors[f"base_model.model.{site.path}.lora_A.weight"].shape[0] for site in plan.sites]
    assert held == ([1, 1, 3, 3, 5, 5] if own_ranks else [5] * 6) and bool(saved["rank_pattern"]) == own_ranks
    adapted: Any = peft.PeftModel.from_pretrained(bert().double(), tmp_path / "adapter").eval()
    expected = step.forward(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=1e-10, atol=1e-10)
        base = bert().double().eval()(**inputs).logits
    assert float((expected - base).abs().max()) > 1e-6


def test_a_draft_needs_no_data() -> None:
    """It says what is to be measured, and every number is 1."""
    draft = surgery.plan(surgery.parse(RULE + STEP), Known().to("meta"), numbers="draft")
    assert set(ranks(draft).values()) == {1}
    assert draft.measured[0].rows == 0 and list(draft.measured[0].blocks) == ["blocks.0", "blocks.1", "blocks.2"]
    with pytest.raises(surgery.SurgError, match="SURG036"):
        pipeline.resolve(surgery.parse(RULE + STEP), Known())


# --- what is refused --------------------------------------------------------------------------------------------------


def test_without_data_it_says_what_it_needs() -> None:
    program = surgery.parse(RULE + STEP)
    for ask in (surgery.plan, surgery.compile, surgery.apply):
        with pytest.raises(surgery.SurgError) as raised:
            ask(program, Known())
        (found,) = raised.value.diagnostics
        assert found.code == "SURG036" and found.span is not None and found.span.text == "hidden_dimension_gain()"
        assert "calibrate = 1000" in (found.help or "")
    found = refusal(model=Known().to("meta"))
    assert found.code == "SURG036" and "weights" in found.message


def test_few_rows_are_refused_or_said() -> None:
    found = refusal(calibration=batches(199))
    assert found.code == "SURG036" and "199 different rows" in found.message and found.span.text.startswith("lora(")
    same = batches(150) + batches(150) + batches(150)
    assert "150 different rows" in refusal(calibration=same).message
    with pytest.warns(UserWarning, match=r"(?s)SURG036.*200 points.*7%.*calibrate = 1000"):
        planned(calibration=batches(200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(calibration=batches(measure.FEW))


def test_rows_that_end_alike_are_one_point() -> None:
    model, rows = llama(), tokens()
    for batch in rows:
        batch["input_ids"][torch.arange(len(batch["labels"])), batch["attention_mask"].sum(1) - 1] = 2
    rule = 'adapt model.layers.0.** : Linear { with lora(rank = hidden_dimension_gain(pooling = "last")) }\n'
    with pytest.raises(surgery.SurgError) as raised:
        surgery.plan(surgery.parse(rule), model, calibration=rows)
    (found,) = raised.value.diagnostics
    assert found.code == "SURG036" and "1 different points of 260 rows" in found.message
    assert 'pooling = "mean"' in (found.help or "")


def test_weights_in_no_block_are_refused() -> None:
    found = refusal("adapt {head,blocks.1.mix} { with lora(rank = hidden_dimension_gain()) }\n")
    assert found.code == "SURG033" and "`head` is in no block" in found.message


class Twice(Known):
    """Its second block runs twice."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x[:, :3] @ self.start
        for number in (0, 1, 1, 2):
            hidden = self.blocks[number](hidden, x[:, 3:])
        return hidden


class Pictures(nn.Module):
    """Blocks of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_without_rows_between_them_are_refused() -> None:
    found = refusal(model=Twice())
    assert found.code == "SURG036" and "[0, 1, 1, 2]" in found.message
    pictures = [{"x": torch.randn(250, 2, 4, 4, generator=torch.Generator().manual_seed(0))}]
    found = refusal(RULE.replace(".mix", ""), Pictures(), pictures)
    assert found.code == "SURG036" and "[250, 2, 4, 4], not [rows, tokens, width]" in found.message
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=20))
    found = refusal("adapt **.SelfAttention.q { with gelora() }\n", t5, [{"input_ids": torch.ones(2, 3).long()}])
    assert found.code == "SURG008"


def test_batches_that_do_not_fit_are_refused() -> None:
    assert refusal(calibration=[{"labels": torch.ones(3, 3)}]).code == "SURG044"
    left = tokens()
    left[1]["attention_mask"] = left[1]["attention_mask"].flip(1)
    rule = 'adapt **.q_proj { with gelora() }\nmodel config "x.json" { task = causal_lm }\n'
    assert refusal(rule, llama(), left).code == "SURG043"
    broken = Known()
    with torch.no_grad():
        broken.start[0, 0] = torch.nan
    found = refusal(model=broken)
    assert found.code == "SURG053" and "at place 0 of `blocks`" in found.message


@pytest.mark.parametrize(
    ("rule", "code", "said"),
    [
        ('with lora(rank = hidden_dimension_gain(pool = "last"))', "SURG002", "pooling"),
        ('with lora(rank = hidden_dimension_gain(pooling = "first"))', "SURG004", '"mean" or "last"'),
        ("with lora(rank = hidden_dimension_gain(pooling = 3))", "SURG004", '"mean" or "last"'),
        ('with lora(rank = hidden_dimension_gain("last"))', "SURG002", "pooling"),
        ("with hidden_dimension_gain() * lora()", "SURG004", "parameters of its method"),
        ("with lora(rank = hidden_dimension_gain() / 2)", "SURG004", "whole number"),
        ("with lora(rank = 8 - 8 * hidden_dimension_gain())", "SURG026", "out of range"),
        ("with lora(rank = 40 * hidden_dimension_gain())", "SURG026", "out of range"),
    ],
)
def test_what_does_not_fit_is_located(rule: str, code: str, said: str) -> None:
    with pytest.raises(surgery.SurgError) as raised:
        surgery.plan(surgery.parse(f"adapt blocks.*.mix {{ {rule} }}\n" + STEP), Known(), numbers="draft")
    (found,) = raised.value.diagnostics
    assert found.code == code and said in found.message + (found.help or "") and found.span is not None


# --- the command line -------------------------------------------------------------------------------------------------

SPEC = """
model "tiny" { task = sequence_classification(labels = 2) }
adapt **.self.{query,value} { with gelora(scale = 2) }
step { optimizer = adamw(lr = 1e-2)  batch = 16  steps = 4  seed = 3  compile = off }
data "many.jsonl" { text = "{text}"  label = kind  calibrate = 240  holdout = 0.1 }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with 300 rows, all different, and a first block that mixes them."""
    folder = tmp_path_factory.mktemp("project")
    save_project(folder)
    model = BertForSequenceClassification.from_pretrained(folder / "tiny")
    with torch.no_grad():
        for parameter in model.bert.encoder.layer[0].parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder / "tiny")
    words, generator = ["red", "green", "blue", "one", "two", "three"], torch.Generator().manual_seed(0)
    rows = []
    for number in range(300):
        text = " ".join(words[n] for n in torch.randint(6, (4 + number % 9,), generator=generator).tolist())
        rows.append({"text": text, "kind": "ab"[number % 2]})
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "spec.surg").write_text(SPEC)
    return folder


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return int(ended.value.code or 0)


def test_the_verbs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """plan and train measure alike; everything after them reads the run alone."""
    spec, out = str(folder / "spec.surg"), str(folder / "run")
    assert run("check", spec) == 0
    assert run("plan", spec, "-v", "-o", str(folder / "plan.json")) == 0
    plan = Plan.model_validate_json((folder / "plan.json").read_text())
    printed, said = capsys.readouterr()
    assert "hidden_dimension_gain(): the model runs over 240 rows first" in said
    assert f"hidden_dimension_gain(), measured on {plan.measured[0].rows} rows" in printed
    before, _ = plan.measured[0].blocks["bert.encoder.layer.0"]
    assert f"bert.encoder.layer.0: hidden states of dimension {before:.1f}" in printed
    assert f"{plan.totals.trainable:,} numbers trained" in printed
    assert list(ranks(plan).values()) == [2, 2, 1, 1] and plan.totals.trainable == (2 + 2 + 1 + 1) * (16 + 16)
    assert surgery.plan(surgery.parse(folder / "spec.surg")).measured == plan.measured  # in Python it reads them itself
    assert run("train", spec, "-o", out, "--device", "cpu") == 0
    assert "hidden_dimension_gain(), measured on" in capsys.readouterr().err
    trained = Plan.model_validate_json((folder / "run" / "plan.json").read_text())
    assert trained.measured[0].blocks == plan.measured[0].blocks and ranks(trained) == ranks(plan)
    (folder / "many.jsonl").rename(folder / "elsewhere.jsonl")
    try:
        assert run("merge", out, "-o", str(folder / "merged")) == 0
        assert run("export", out, "--to", "peft", "-o", str(folder / "adapter")) == 0
        assert surgery.load(folder / "run").plan.measured == trained.measured
    finally:
        (folder / "elsewhere.jsonl").rename(folder / "many.jsonl")
    assert run("eval", out, "--device", "cpu") == 0


def test_a_run_is_resumed_with_its_own_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its folder, and by the spec, whose rows may be others by then."""
    spec, whole, cut = str(folder / "spec.surg"), str(folder / "whole"), str(folder / "cut")
    assert run("compile", spec, "-o", whole, "--device", "cpu") == 0
    assert run("train", whole, "--device", "cpu") == 0
    assert run("train", spec, "-o", cut, "--device", "cpu") == 0
    assert run("train", spec, "-o", cut, "--resume", "--device", "cpu") == 0
    one, other = (surgery.load(path).weights for path in (whole, cut))
    assert all(torch.equal(other[name], value) for name, value in one.items())
    for number, edited in enumerate(('rank = hidden_dimension_gain(estimator = "likelihood"), scale = 2', "rank = 2")):
        (folder / f"edited_{number}.surg").write_text(SPEC.replace("scale = 2", edited))
        assert run("train", str(folder / f"edited_{number}.surg"), "-o", cut, "--resume", "--device", "cpu") == 1
        assert "is a run of another spec" in capsys.readouterr().err


def test_module_scope_measures_too(folder: Path) -> None:
    spec, out = str(folder / "spec.surg"), str(folder / "modules")
    assert run("train", spec, "-o", out, "--scope", "module", "--device", "cpu") == 0
    trained = Plan.model_validate_json((folder / "modules" / "plan.json").read_text())
    assert ranks(trained) == ranks(surgery.plan(surgery.parse(folder / "spec.surg")))
    assert run("train", out, "--resume", "--device", "cpu") == 0


def test_two_processes_have_one_number(folder: Path) -> None:
    """In both scopes; each process measures, and its shapes are those of the run of one."""
    spec, scopes = str(folder / "spec.surg"), ("graph", "module")
    run_together(folder, [["train", spec, "-o", str(folder / f"two_{scope}"), "--scope", scope, "--device", "cpu"]
                          for scope in scopes])  # fmt: skip
    alone = surgery.plan(surgery.parse(folder / "spec.surg"))
    for scope in scopes:
        trained = Plan.model_validate_json((folder / f"two_{scope}" / "plan.json").read_text())
        assert ranks(trained) == ranks(alone) and trained.measured[0].rows == alone.measured[0].rows
        assert surgery.load(folder / f"two_{scope}").step == 4


def test_the_command_line_says_what_it_lacks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare, default = SPEC[: SPEC.index("data")], SPEC.replace("calibrate = 240", "")
    for name, text, verbs, said in (
        ("bare", bare, ("plan", "compile"), "there is none"),
        ("default", default, ("check", "plan", "compile", "train"), "128 different rows"),
    ):
        spec, out = str(folder / f"{name}.surg"), ["-o", str(folder / name)]
        (folder / f"{name}.surg").write_text(text)
        for verb in verbs:
            assert run(verb, spec, *(out if verb in ("compile", "train") else [])) == 1
            error = capsys.readouterr().err
            assert "SURG036" in error and said in error and "calibrate = 1000" in error, (verb, error)
        assert run("check", spec) == int("check" in verbs)
