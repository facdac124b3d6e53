"""What cannot be spread over processes is said at its line, before anything runs; and how rows are cut and written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery.cli.train import own_device
from surgery.compiler.diagnostics import SurgError
from surgery.compiler.kernels import over_processes
from surgery.compiler.memory_spread import of_processes
from surgery.compiler.plan import Plan
from surgery.runtime import distributed, distributed_checks
from surgery.runtime.data import Examples, Stream
from surgery.runtime.distributed_checks import check_model, check_spread
from surgery.runtime.mapped import mapped_model
from surgery.runtime.models import load_model
from tests.processes import save_folder

CONFIGS = Path(__file__).parents[2] / "specs"
MODEL = 'model config "configs/tiny_llama.json" { task = causal_lm MORE }\n'
LORA = "adapt model.layers.*.mlp.*_proj { with lora(rank = 2) }\n"
# W moves by a circulant matrix, which has no narrow factors
MOVED = """method moved() {
    requires in == out
    a = train normal(0.1)[in]
    delta = circ(a)
    after step { W += delta }
}
adapt model.layers.*.self_attn.q_proj { with moved() }
"""


def planned(text: str, model: str = "") -> Plan:
    return surgery.plan(surgery.parse(MODEL.replace("MORE", model) + text, CONFIGS))


@pytest.mark.parametrize(
    ("text", "scope", "count", "marked"),
    [
        (LORA + "step { optimizer = sgd(lr = 1)  batch = 3 }", "graph", 4, "batch = 3"),
        (LORA + "step { optimizer = sgd(lr = 1)  compile = reduce_overhead }", "graph", 2, "compile = reduce_overhead"),
        (LORA + "step { optimizer = sgd(lr = 1)  compile = on }", "module", 1, "compile = on"),
        (MOVED, "module", 2, "after step { W += delta }"),
    ],
    ids=["rows", "replay", "compiled", "event"],
)
def test_what_is_refused_is_marked(text: str, scope: str, count: int, marked: str) -> None:
    (found,) = check_spread(planned(text), scope, count).errors
    assert found.code == "SURG072" and found.help
    assert found.span is not None and found.span.text == marked


@pytest.mark.parametrize(
    ("text", "scope", "count"),
    [
        (LORA + "step { optimizer = sgd(lr = 1)  batch = 3 }", "graph", 3),
        (LORA + "step { optimizer = sgd(lr = 1)  compile = reduce_overhead }", "graph", 1),
        (LORA + "step { optimizer = sgd(lr = 1)  compile = on }", "graph", 2),
        (MOVED, "graph", 2),
        (MOVED, "module", 1),
    ],
)
def test_the_rest_is_not(text: str, scope: str, count: int) -> None:
    assert not check_spread(planned(text), scope, count).errors


def test_running_statistics_are_of_a_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model = planned(LORA), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert not check_model(plan, model).errors
    monkeypatch.setattr(distributed_checks, "processes", lambda: 2)
    (found,) = check_model(plan, model).errors
    assert found.code == "SURG072" and "`1`" in found.message and found.span is not None and found.span.line == 1


def test_each_process_has_a_gpu_of_its_own_or_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "local_device", lambda: "cuda:99")
    with pytest.raises(SurgError) as refused:
        own_device(None)
    (found,) = refused.value.diagnostics
    assert found.code == "SURG072" and "`cuda:99`" in found.message and found.help
    assert own_device("cpu") == "cpu"


def test_earlier_blocks_are_unknown_in_module_scope() -> None:
    from surgery.runtime.module_step import module_step

    text = MODEL.replace("MORE", "") + "adapt model.layers.*.self_attn.q_proj { with reslora(rank = 2) }"
    with pytest.raises(SurgError) as refused:
        module_step(surgery.parse(text, CONFIGS), "cpu")
    assert [found.code for found in refused.value.diagnostics] == ["SURG060"]
    line = "adapt model.layers.*.self_attn.q_proj { with reslora(rank = 2) }"
    assert not check_spread(planned(line), "graph", 2).errors
    (found, *_) = check_spread(planned(line), "module", 2).errors  # before data are read, and by `surgery plan`
    assert found.code == "SURG060" and found.span is not None and found.span.text == line


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_share_the_rows_of_each_step(processes: int) -> None:
    """Each row once, in each epoch; nobody has two rows more than another."""
    examples = Examples(tuple([1] * (2 + 7 * n % 11) for n in range(13)), None, 0)
    streams = [Stream(examples, 8, 5, process, processes) for process in range(processes)]
    one = Stream(examples, 8, 5)
    for step in range(6):
        parts = [stream.batch(step) for stream in streams]
        sizes = [len(part["input_ids"]) for part in parts]
        assert max(sizes) == sizes[0] and sizes[0] - min(sizes) <= 1
        tokens = sum(int(part["attention_mask"].sum()) for part in parts)
        assert tokens == int(one.batch(step)["attention_mask"].sum())
        assert all(part.keys() == parts[0].keys() and part["labels"].dtype == torch.int64 for part in parts)


class Spread:
    """What `of_own_rows` reads of a `DTensor`."""

    def __init__(self, *shape: int) -> None:
        self.shape = torch.Size(shape)

    def dim(self) -> int:
        return len(self.shape)

    def to_local(self) -> None: ...


@pytest.mark.parametrize("processes", [2, 3, 4, 7])
@pytest.mark.parametrize("kind", ["plain", "transposed", "stacked"])
def test_rows_of_a_product_need_rows_of_a_factor(kind: str, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of all processes together are the product, also where some have fewer or none (`torch.chunk`)."""
    torch.manual_seed(0)
    left, right = torch.randn(5, 9, 2), torch.randn(5, 2, 6)
    if kind != "stacked":
        left, right = left[0], right[0]
    whole = (left @ right).mT.contiguous() if kind == "transposed" else left @ right
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    parts = []
    for process in range(processes):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda process=process: process)
        target: torch.Tensor = Spread(*whole.shape)  # type: ignore[assignment]
        (one,), (other,) = over_processes.of_own_rows([target], [left], [right], kind == "transposed")
        parts.append((one @ other).mT if kind == "transposed" else one @ other)
    torch.testing.assert_close(torch.cat(parts), whole)
    chunks = torch.chunk(whole, processes)
    assert [len(part) for part in parts if len(part)] == [len(chunk) for chunk in chunks]


def test_a_mapped_checkpoint_is_the_loaded_one(tmp_path: Path) -> None:
    """Ties and buffers too; another dtype is for transformers to convert."""
    save_folder(tmp_path)
    text = 'model "llama" { task = causal_lm  dtype = DTYPE }\nadapt **.up_proj { with lora(rank = 2) }'
    line = surgery.parse(text.replace("DTYPE", "float64"), tmp_path).model
    assert line is not None
    mapped = mapped_model(line, tmp_path)
    assert mapped is not None and mapped.lm_head.weight is mapped.model.embed_tokens.weight  # type: ignore[union-attr]
    ids = torch.randint(0, 300, (2, 9))
    logits = [model(input_ids=ids).logits for model in (mapped, load_model(line, tmp_path))]
    assert torch.equal(*logits)
    other = surgery.parse(text.replace("DTYPE", "float32"), tmp_path).model
    assert other is not None and mapped_model(other, tmp_path) is None


def test_memory_on_each_of_several() -> None:
    """Frozen weights are divided, what is trained is not; a piece of the model and its buffer are whole for a while."""
    text = LORA + "step { optimizer = adamw(lr = 1)  batch = 8  micro_batch = 2  compile = off }"
    program = surgery.parse(MODEL.replace("MORE", "dtype = float32") + text, CONFIGS)
    plan = surgery.plan(program)
    model = load_model(plan.model, CONFIGS)
    one, graph, module = (of_processes(plan, model, *how) for how in ((1, "module"), (2, "graph"), (2, "module")))
    assert (one.gathered, graph.gathered, graph.processes) == (0, 0, 2)
    assert graph.weights == one.weights and module.trained == one.trained and module.kept == one.kept
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert one.weights - module.weights == numbers * 4 // 2  # all sizes are even
    layer = sum(parameter.numel() for parameter in model.get_submodule("model.layers.0").parameters())
    assert module.gathered == 2 * layer * 4
    assert one.outputs - module.outputs == 4 * 2048 * 8 * 2  # four rows fewer of tokens and of labels
    spared = one.weights - module.weights + one.outputs - module.outputs
    assert module.peak == one.peak - spared + module.gathered
