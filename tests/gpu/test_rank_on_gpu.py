"""`surgery rank` on a CUDA device gives the figures and adapters of the CPU; run by `make gpu`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import cli

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ("cpu", "cuda")


def test_figures_and_adapters_are_those_of_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    model = LlamaForCausalLM(config).double()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, dtype=torch.float64))
    model.save_pretrained(tmp_path / "target")
    figures, products = {}, []
    for device in DEVICES:
        adapter = tmp_path / device
        arguments = ["rank", str(tmp_path / "base"), str(tmp_path / "target"), "--format", "json", "--device", device]
        groups = ["--group", "**.o_proj @ **.v_proj", "--rank", "5", "--adapters", str(adapter), "--dtype", "float64"]
        code, out, err = cli(capsys, *arguments, *groups)
        assert not code, err
        figures[device] = json.loads(out)
        tensors = load_file(adapter / "adapter_model.safetensors")
        pairs = {key: tensors[key.replace("lora_A", "lora_B")] @ tensors[key] for key in tensors if "lora_A" in key}
        products.append({key: value for key, value in pairs.items() if "embed" not in key})
    for kind in ("weights", "groups"):
        for here, there in zip(*(figures[device][kind] for device in DEVICES), strict=True):
            assert [here[name] for name in ("name", "rank", "suffices", "chosen")] == [
                there[name] for name in ("name", "rank", "suffices", "chosen")
            ]
            for name in ("singular_values", "error", "size", "share"):
                assert there[name] == pytest.approx(here[name], rel=1e-9, abs=1e-11)
    torch.testing.assert_close(products[1], products[0], rtol=1e-6, atol=1e-8)


def test_the_time_of_a_layer_of_an_8b_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The seconds that its two kinds of matrices take; printed, with the ranks of known changes checked."""
    generator = torch.Generator().manual_seed(0)
    base = {"q": torch.randn(4096, 4096, generator=generator), "up": torch.randn(14336, 4096, generator=generator)}
    save_file(base, tmp_path / "base.safetensors")
    target = {}
    for name, weight in base.items():  # of rank 16 but for the rounding of the sum: a float32 product is not
        left, right = (torch.randn(*shape, generator=generator).double() for shape in ((len(weight), 16), (16, 4096)))
        target[name] = (weight + left @ right).float()
    save_file(target, tmp_path / "target.safetensors")
    begin = time.perf_counter()
    files = [str(tmp_path / f"{name}.safetensors") for name in ("base", "target")]
    code, out, err = cli(capsys, "rank", *files, "--device", "cuda", "--format", "json")
    assert not code, err
    assert [row["rank"] for row in json.loads(out)["weights"]] == [16, 16]
    with capsys.disabled():
        print(f"\nsurgery rank: 4096 x 4096 and 14336 x 4096 in {time.perf_counter() - begin:.1f} s")
