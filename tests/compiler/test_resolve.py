"""The plan of real module trees: what is selected, coordinates, sharing, tied weights, freezing, totals, strategies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import compiler
from surgery.compiler.plan import Plan

LOW_RANK = "A = train kaiming_uniform[rank, in]\nB = train zeros[out, rank]\ndelta = B @ A"


def planned(text: str, model: nn.Module, body: str = LOW_RANK) -> Plan:
    return surgery.plan(surgery.parse(f"method m(rank: int = 2) {{\n{body}\n}}\n{text}"), model)


def refused(text: str, model: nn.Module, body: str = LOW_RANK) -> list[str]:
    with pytest.raises(surgery.SurgError) as raised:
        planned(text, model, body)
    assert all(diagnostic.span is not None for diagnostic in raised.value.diagnostics)
    return [diagnostic.code for diagnostic in raised.value.diagnostics]


def coordinates(plan: Plan) -> list[dict[str, int]]:
    return [plan.formulas[site.formula].coordinates for site in plan.sites]


# --- selection --------------------------------------------------------------------------------------------------------


def test_the_base_model_prefix_may_be_left_out(architectures: Any) -> None:
    model = architectures["bert"].model()
    short, long = (
        planned(f"adapt {prefix}encoder.layer.*.attention.self.{{query,value}} {{ with m }}", model)
        for prefix in ("", "bert.")
    )
    paths = [site.path for site in short.sites]
    assert paths == [site.path for site in long.sites]
    assert paths[0] == "bert.encoder.layer.0.attention.self.query" and len(paths) == 4


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        ("model.layers.*.self_attn.*_proj", 8),
        ("model.layers.[1..1].self_attn.*_proj", 4),
        ("model.layers.[0..1].mlp.{up_proj,gate_proj}", 4),
        ("model.layers.** : Linear", 14),
        ("** : Linear", 15),
        ("** : Linear except lm_head", 14),
        ("** : Linear except model.layers.0.** except lm_head", 7),
        ("** : Linear where in == out", 4),
        ("** : Linear where in > 32 or out < 32", 6),
        ('** : Linear where kind != "lm_head" and not in == out', 10),
        ('** : Linear where kind == "mlp.down_proj"', 2),
        ("** : Linear where layer == 1", 7),
        ("model.layers.*.self_attn.q_proj.weight", 2),  # a parameter instead of its module
    ],
)
def test_rules_select(rule: str, count: int, architectures: Any) -> None:
    plan = planned(
        f"adapt {rule} {{ with m  expect {count} }}", architectures["llama"].model(tie_word_embeddings=False)
    )
    assert plan.totals.sites == len(plan.sites) == count


@pytest.mark.parametrize(
    ("rule", "codes"),
    [
        ("adapt model.layers.*.self_attn.nothing { with m }", ["SURG020"]),
        ("adapt model.layers.*.self_attn.{q_proj,z_proj} { with m }", ["SURG021"]),
        ("adapt model.layers.[0..5].self_attn.q_proj { with m }", ["SURG021"]),
        ("adapt ** : Lineal { with m }", ["SURG021"]),
        ("adapt **.q_proj except **.k_proj { with m }", ["SURG021"]),
        ("adapt **.q_proj where in > 999 { with m }", ["SURG020"]),
        ("adapt **.q_proj { with m  expect 3 }", ["SURG022"]),
        ("adapt **.q_proj { with m }\nadapt **.*_proj { with m }", ["SURG023"]),
        ("adapt **.q_proj { with m }\ntrain model.layers.0", ["SURG023"]),
        ("adapt **.q_proj { with m  untie }", ["SURG024"]),
        ("adapt model.norm { with m }", ["SURG025"]),
        ("adapt **.q_proj { with m(rank = 33) }", ["SURG026"]),
        ("adapt **.q_proj where foo == 1 { with m }", ["SURG002"]),
        ("train model.nothing", ["SURG020"]),
        ("adapt model.layer.*.q { with m }\nadapt **.q_proj { with m(rank = 99) }", ["SURG020", "SURG026"]),
    ],
)
def test_rules_are_refused(rule: str, codes: list[str], architectures: Any) -> None:
    assert refused(rule, architectures["llama"].model()) == codes


def test_the_part_that_is_wrong_is_offered(architectures: Any) -> None:
    with pytest.raises(surgery.SurgError) as raised:
        planned("adapt model.layers.*.self_atn.{q_proj,v_proj} { with m }", architectures["llama"].model())
    assert raised.value.diagnostics[0].help == "did you mean `self_attn`?"


@pytest.mark.parametrize(("name", "positions"), [("bert", 40), ("gpt2", 40), ("roberta", 38), ("llama", None)])
def test_rows_fit_the_table_of_positions(name: str, positions: int | None, architectures: Any) -> None:
    model = architectures[name].model(max_position_embeddings=40)
    whole = "transformer.h.0" if name == "gpt2" else "**.layers.0" if name == "llama" else "encoder.layer.0"

    def length(settings: str) -> int:
        data = surgery.plan(
            surgery.parse(f'train {whole}\ndata "a.jsonl" {{ text = "{{a}}"  {settings} }}'), model
        ).data
        assert data is not None
        return data.max_length

    assert length("") == (positions or 512)
    assert length(f"max_length = {positions or 4096}") == (positions or 4096)
    if positions is not None:
        with pytest.raises(surgery.SurgError) as raised:
            length(f"max_length = {positions + 1}")
        found = raised.value.diagnostics[0]
        assert found.code == "SURG031" and found.span is not None and found.span.text.startswith("max_length")


def test_what_is_no_program_or_no_module_is_said_so() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(TypeError, match=r"surgery\.parse"):
        surgery.plan("adapt ** { with lora }", model)  # type: ignore[arg-type]
    program = surgery.parse("adapt a { with lora(rank = 2) }")
    with pytest.raises(TypeError, match="not a int"):
        surgery.compile(program, model=3)  # type: ignore[arg-type]
    plan = surgery.plan(program, nn.ModuleDict({"a": model}))
    with pytest.raises(TypeError, match=r"torch\.export"):
        compiler.rewrite(model, plan)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"surgery\.plan"):
        compiler.rewrite(torch.fx.symbolic_trace(model), program)  # type: ignore[arg-type]
    with pytest.raises(surgery.SurgError, match="SURG041"):
        compiler.rewrite(torch.fx.symbolic_trace(nn.Sequential(model)), plan)


def test_nothing_is_touched(architectures: Any) -> None:
    model = architectures["llama"].model()
    before = {name: (id(value), value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    planned("adapt **.q_proj { with m }\ntrain model.norm", model)
    refused("adapt **.q_proj { with m }\nadapt **.q_proj { with m }", model)
    for name, value in model.named_parameters():
        identity, copy, gradient = before[name]
        assert id(value) == identity and torch.equal(value, copy) and value.requires_grad == gradient


def test_sizes_that_do_not_divide_name_the_site(architectures: Any) -> None:
    with pytest.raises(surgery.SurgError) as raised:
        planned("adapt **.q_proj { with m(rank = 3) }", architectures["llama"].model(),
                "A = train zeros[in / rank, in]\nB = train zeros[out, in / rank]\ndelta = B @ A")  # fmt: skip
    (found, *_) = raised.value.diagnostics
    assert found.code == "SURG027" and "32 / 3" in found.message
    assert any("self_attn.q_proj" in note.message for note in found.notes)


def test_a_requirement_names_the_site(architectures: Any) -> None:
    model = architectures["llama"].model()
    assert refused("adapt **.k_proj { with m }", model, f"requires in == out\n{LOW_RANK}") == ["SURG028"]
    assert planned("adapt **.q_proj { with m }", model, f"requires in == out\n{LOW_RANK}").totals.sites == 2


# --- coordinates ------------------------------------------------------------------------------------------------------

READS_ALL = (
    "A = train zeros[rank, in]\nB = train zeros[out, rank]\n"
    "delta = (1 + layer + layers + slot + slots + site + sites) * B @ A"
)


def test_layers_count_over_all_stacks(architectures: Any) -> None:
    plan = planned("adapt **.{q,wi} { with m }", architectures["t5"].model(), READS_ALL)
    for site, found in zip(plan.sites, coordinates(plan), strict=True):
        stack = 0 if site.path.startswith("encoder") else 2
        assert site.layer == found["layer"] == stack + int(site.path.split(".")[2])
        assert found["layers"] == 4 and found["sites"] == len(plan.sites)
    kinds = list(dict.fromkeys(site.kind for site in plan.sites))
    assert "layer.0.SelfAttention.q" in kinds and "layer.1.EncDecAttention.q" in kinds
    assert [found["slot"] for found in coordinates(plan)] == [kinds.index(site.kind) for site in plan.sites]
    assert [found["site"] for found in coordinates(plan)] == list(range(len(plan.sites)))


def test_layers_count_the_rule_s_blocks_only(architectures: Any) -> None:
    plan = planned("adapt model.layers.1.self_attn.q_proj { with m }", architectures["llama"].model(), READS_ALL)
    assert coordinates(plan) == [{"layer": 0, "layers": 1, "slot": 0, "slots": 1, "site": 0, "sites": 1}]


def test_a_site_outside_of_all_blocks_has_no_layer(architectures: Any) -> None:
    model = architectures["bert"].model()
    assert refused("adapt classifier { with m }", model, READS_ALL) == ["SURG033"]
    (site,) = planned("adapt classifier { with m }", model).sites
    assert site.layer is None and site.kind == "classifier"


def test_heads_are_those_of_keys_and_values_for_k_and_v(architectures: Any) -> None:
    body = "A = train zeros[heads * head_dim, in]\nB = train zeros[out, heads * head_dim]\ndelta = B @ A"
    plan = planned("adapt **.{q_proj,k_proj,v_proj} { with m }", architectures["llama"].model(), body)
    heads = {site.kind: found["heads"] for site, found in zip(plan.sites, coordinates(plan), strict=True)}
    assert heads == {"self_attn.q_proj": 4, "self_attn.k_proj": 2, "self_attn.v_proj": 2}
    assert all(found["head_dim"] == 8 for found in coordinates(plan))
    most = body.replace("heads *", "max_heads *").replace("delta = B @ A", "delta = (B @ A)[0:out, 0:in]")
    plan = planned("adapt **.{q_proj,k_proj,v_proj} { with m }", architectures["llama"].model(), most)
    assert all(found["max_heads"] == 4 for found in coordinates(plan))
    wide = planned("adapt encoder.**.q { with m }", architectures["t5"].model(d_kv=16), body)
    assert {found["head_dim"] for found in coordinates(wide)} == {16}
    assert refused("adapt 0 { with m }", nn.Sequential(nn.Linear(4, 4)), body)[0] == "SURG033"


def test_the_largest_sizes_are_those_of_the_rule(architectures: Any) -> None:
    body = "A = train zeros[rank, max_in]\nB = train zeros[max_out, rank]\ndelta = (B @ A)[0:out, 0:in]"
    plan = planned("adapt model.layers.*.mlp.{up_proj,down_proj} { with m }", architectures["llama"].model(), body)
    assert all(found == {"max_in": 48, "max_out": 48} for found in coordinates(plan))


def test_conv1d_is_transposed_storage(architectures: Any) -> None:
    (site, *_) = planned("adapt **.c_attn { with m }", architectures["gpt2"].model()).sites
    assert site.shape == (96, 32) and site.transposed and site.module_class == "Conv1D"


# --- sharing ----------------------------------------------------------------------------------------------------------


def shared(how: str) -> str:
    return f"A = train zeros[rank, in] shared by {how}\nB = train zeros[out, rank]\ndelta = B @ A"


@pytest.mark.parametrize(("how", "groups"), [("model", 1), ("layer", 2), ("kind", 3)])
def test_a_shared_tensor_is_counted_once(how: str, groups: int, architectures: Any) -> None:
    rule = "adapt model.layers.*.self_attn.{q_proj,k_proj,v_proj} { with m }"
    plan = planned(rule, architectures["llama"].model(), shared(how))
    assert len({site.tensors[0].key for site in plan.sites}) == groups
    assert len({site.tensors[1].key for site in plan.sites}) == 6
    assert plan.totals.trainable == groups * 2 * 32 + 2 * 2 * (32 + 16 + 16)
    assert plan.totals.trainable == sum(site.trainable for site in plan.sites)


RULES = "adapt **.q_proj { with m }\nadapt **.k_proj { with m }"


def test_rules_share_what_has_a_name(architectures: Any) -> None:
    model = architectures["llama"].model()
    plan = planned(RULES, model, shared("model"))
    assert len({site.tensors[0].key for site in plan.sites}) == 2
    body = (
        "A = frozen zeros[rank, max_in] shared by model as pool\n"
        "B = frozen zeros[max_out, rank] shared by model as pool\n"
        "d = train ones[sites]\ndelta = d[site] * B[0:out, :] @ A[:, 0:in]"
    )
    plan = planned(RULES, model, body)
    assert len({tensor.key for site in plan.sites for tensor in site.tensors[:2]}) == 2
    # as NAME joins the rules: their coordinates count over the sites of both
    assert [found["site"] for found in coordinates(plan)] == [0, 1, 2, 3]
    assert all(found["sites"] == 4 and found["max_out"] == 32 for found in coordinates(plan))
    assert plan.totals.frozen == 2 * (32 + 32) and plan.totals.trainable == 4 * 4


def test_shapes_of_a_shared_tensor_agree(architectures: Any) -> None:
    model = architectures["llama"].model()
    body = "A = train zeros[rank, in]\nB = train zeros[out, rank] shared by model\ndelta = B @ A"
    assert "SURG005" in refused("adapt **.{q_proj,k_proj} { with m }", model, body)


@pytest.mark.parametrize(
    "change", [("train zeros", "frozen zeros"), ("zeros", "ones"), (" as pool", " as pool { lr = 1e-3 }")]
)
def test_definitions_of_a_shared_tensor_agree(change: tuple[str, str], architectures: Any) -> None:
    other = shared("model as pool").replace(*change, 1)
    text = f"method n(rank: int = 2) {{\n{other}\n}}\nadapt **.q_proj {{ with m }}\nadapt **.o_proj {{ with n }}"
    codes = refused(text, architectures["llama"].model(), shared("model as pool"))
    assert codes == ["SURG009"]


def test_one_start_of_a_shared_tensor(architectures: Any) -> None:
    method = "method n(std: real) {\nA = train normal(std)[1] shared by model as pool\ndelta = A * W\n}\n"
    model, text = (
        architectures["llama"].model(),
        method + "adapt **.q_proj { with n(1) }\nadapt **.o_proj { with n(STD) }",
    )
    assert refused(text.replace("STD", "2"), model) == ["SURG009"]
    assert len(planned(text.replace("STD", "1"), model).sites) == 4


# --- tied, frozen, totals ---------------------------------------------------------------------------------------------


def test_one_of_a_tied_pair_needs_untie(architectures: Any) -> None:
    model = architectures["qwen2"].model()
    assert refused("adapt lm_head { with m }", model) == ["SURG024"]
    (site,) = planned("adapt lm_head { with m  untie }", model).sites
    assert site.untied and site.path == "lm_head"
    for path in ("lm_head", "model.embed_tokens"):  # one site, in the head's orientation
        (site,) = planned(f"adapt {path} {{ with m  tie }}", model).sites
        assert not site.untied and site.path == "lm_head" and site.shape == (97, 32)
    assert refused("adapt model.layers.0.mlp.up_proj { with m  tie }", model) == ["SURG024"]


def test_freeze_takes_away_from_train(architectures: Any) -> None:
    model = architectures["llama"].model()
    plan = planned("train model.layers.0 { lr = 1e-3 }\nfreeze model.layers.0.mlp", model)
    names = [entry.name for entry in plan.trained]
    assert names and not any("mlp" in name for name in names)
    assert {entry.lr for entry in plan.trained} == {1e-3}
    assert refused("train model.norm\nfreeze model.nothing", model) == ["SURG020"]


def test_a_tied_parameter_is_frozen_under_all_its_names(architectures: Any) -> None:
    plan = planned("train **\nfreeze model.embed_tokens", architectures["qwen2"].model())
    assert plan.trained and not {"lm_head.weight", "model.embed_tokens.weight"} & {entry.name for entry in plan.trained}


def test_a_tied_parameter_is_trained_once(architectures: Any) -> None:
    plan = planned("train lm_head\ntrain model.embed_tokens", architectures["qwen2"].model())
    assert len(plan.trained) == 1


def test_totals(architectures: Any) -> None:
    model = architectures["bert"].model()
    plan = planned("adapt **.query { with m(rank = 4) }\ntrain classifier", model)
    own = 2 * 4 * (32 + 32)
    assert plan.totals.trainable == own + 3 * 32 + 3
    assert plan.totals.model == sum(value.numel() for value in model.parameters())
    assert plan.totals.share == pytest.approx(plan.totals.trainable / plan.totals.model)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


# --- readings and strategies ------------------------------------------------------------------------------------------


class Linears(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "rule", "update"),
    [
        (torch.float64, "", "literal"),
        (torch.float32, "", "literal"),
        (torch.bfloat16, "", "telescope"),
        (torch.float16, "", "telescope"),
        (torch.float32, "update = telescope", "telescope"),
        (torch.bfloat16, "update = telescope", "telescope"),
        (torch.float32, "update = literal", "literal"),
        (torch.bfloat16, "update = literal", "literal from the start"),
        (torch.float16, "update = literal", "literal from the start"),
    ],
)
def test_the_reading_follows_the_dtype(dtype: torch.dtype, rule: str, update: str) -> None:
    (site,) = planned(f"adapt a {{ with delta_lora(rank = 2)  {rule} }}", Linears(dtype)).sites
    assert site.update == update.split()[0]
    names = [tensor.name for tensor in site.tensors]
    states = {"literal": [], "literal from the start": ["A_start", "B_start"]}
    assert names == ["A", "B", *states.get(update, ["A_start", "B_start", "telescope"])]
    assert site.facts.moves_base and site.trainable == 2 * 2 * 8


@pytest.mark.parametrize(
    ("event", "result", "reason"),
    [
        ("after step { W += delta }", "delta = B @ A", "the event is not"),
        ("after step { W *= 2 }", "delta = B @ A", "the event is not"),
        ("after step { W += 2 * (delta - prev(delta)) }\nafter step { W *= 2 }", "delta = B @ A", "several events"),
        ("after step when step < 9 { W += delta - prev(delta) }", "delta = B @ A", "can become false"),
        ("after step when step % 2 == 0 { W += delta - prev(delta) }", "delta = B @ A", "can become false"),
        ("after step { W += delta - prev(delta) }", "delta = B @ A @ W.T @ W", "delta reads W"),
        ("after step { W += delta - prev(delta) }\nafter step { A *= 0.9 }", "delta = B @ A", "another event assigns"),
        ("after step { W += B @ A }", "weight = W + B @ A", "only a `delta`"),
        ("A_start = frozen zeros[in]\nafter step { W += delta - prev(delta) }", "delta = B @ A", "`A_start`"),
    ],
)
def test_where_the_telescope_is_not_legal(event: str, result: str, reason: str) -> None:
    body = f"A = train zeros[rank, in]\nB = train zeros[out, rank]\n{result}\n{event}"
    model = nn.ModuleList([Linears(torch.float32)])
    with pytest.raises(surgery.SurgError) as raised:
        planned("adapt 0.a { with m  update = telescope }", model, body)
    (found,) = raised.value.diagnostics
    assert found.code == "SURG032" and reason in found.message
    half = nn.ModuleList([Linears(torch.bfloat16)])
    assert refused("adapt 0.a { with m }", half, body) == ["SURG032"]


def test_a_method_that_leaves_w_alone_has_no_update() -> None:
    assert refused("adapt a { with m  update = telescope }", Linears(torch.float32)) == ["SURG032"]


@pytest.mark.parametrize("strategy", ["branch", "fold"])
def test_a_strategy_can_be_forced(strategy: str) -> None:
    (site,) = planned(f"adapt a {{ with m  strategy = {strategy} }}", Linears(torch.float32)).sites
    assert site.strategy == strategy and site.reason == "as the spec says"


def test_the_strategy_is_the_cheaper_legal_one() -> None:
    wide = nn.Sequential(nn.Linear(512, 512))
    (site,) = planned("adapt 0 { with m(rank = 2) }", wide).sites
    free = [found for found in site.candidates if not found.reason]  # the others only when the spec asks for them
    costs = {found.strategy: found.flops + 15 * (found.bytes + found.kept) for found in free}
    assert site.strategy == min(costs, key=lambda name: costs[name]) and "times as much" in site.reason
    (site,) = planned("adapt a { with m }", Linears(torch.bfloat16)).sites
    assert site.strategy == "branch" and "rounding" in site.reason


def test_fold_is_not_legal_under_dropout() -> None:
    rule = "adapt a {{ with lora(rank = 2, dropout = 0.1)  {} }}"
    assert refused(rule.format("strategy = fold"), Linears(torch.float32)) == ["SURG032"]
    (site,) = planned(rule.format(""), Linears(torch.float32)).sites
    assert site.strategy == "branch" and [found.legal for found in site.candidates] == [True, False, False]


def test_adapter_dtype() -> None:
    def dtype(model: torch.dtype, step: str) -> str:
        return planned(f"adapt a {{ with m }}\nstep {{ {step} }}", Linears(model)).sites[0].tensors[0].dtype

    assert dtype(torch.bfloat16, "") == "float32" and dtype(torch.float64, "") == "float64"
    assert dtype(torch.float32, "adapter_dtype = bfloat16") == "bfloat16"


@pytest.mark.parametrize(
    ("rule", "step", "wrong"),
    [
        ("train head", "optimizer = adamw(lr = 1e-3)", True),
        ("train head", "optimizer = sgd(lr = 1e-3)", False),
        ("adapt head { with lora(rank = 1) }", "optimizer = adamw(lr = 1e-3)", False),
        ("adapt head { with lora(rank = 1) }", "optimizer = adamw(lr = 1e-3) adapter_dtype = float16", True),
    ],
)
def test_adamw_in_float16_is_refused(rule: str, step: str, wrong: bool) -> None:
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 4)}).half()
    program = surgery.parse(f"{rule}\nstep {{ {step} }}")
    if not wrong:
        assert surgery.plan(program, model).totals.trainable
        return
    with pytest.raises(surgery.SurgError) as raised:
        surgery.plan(program, model)
    assert [found.code for found in raised.value.diagnostics] == ["SURG032"]
