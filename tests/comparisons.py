"""What the tests of `surgery rank` have in common: models with known changes, and the figures of a comparison."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.compiler.weights import Layout, module_layout
from tests.command_line import cli

Figures = dict[str, Any]


def rank(capsys: pytest.CaptureFixture[str], *arguments: object) -> Figures:
    """The figures of `surgery rank ARGUMENTS`, weights and groups by name."""
    capsys.readouterr()
    code, out, err = cli(capsys, "rank", *map(str, arguments), "--format", "json", "--device", "cpu")
    assert not code, out + err
    found: Figures = json.loads(out)
    for kind in ("weights", "groups"):
        found[kind] = {row["name"]: row for row in found[kind]}
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> Figures:
    """The diagnostic of a `surgery rank` that fails."""
    capsys.readouterr()
    code, out, _ = cli(capsys, "rank", *map(str, arguments), "--format", "json", "--device", "cpu")
    assert code == 1
    found: Figures
    (found,) = json.loads(out)["diagnostics"]
    return found


def codes(found: Figures) -> list[str]:
    return [diagnostic["code"] for diagnostic in found["diagnostics"]]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(parameter: Tensor, number: int, seed: int, stacked: bool = False) -> Tensor:
    """A change of a stored weight that has this rank."""
    stack, (first, *rest) = parameter.shape[:1] * stacked, parameter.shape[stacked:]
    others = torch.Size(rest).numel()
    found = noise(*stack, first, number, seed=seed) @ noise(*stack, number, others, seed=seed + 1)
    return 0.02 * found.reshape(parameter.shape)


def changed(model: nn.Module) -> tuple[nn.Module, dict[str, int]]:
    """A copy of a model with low-rank changes of all its matrices, and their ranks by name."""
    target = copy.deepcopy(model)
    ranks: dict[str, int] = {}
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            layout = module_layout(target.get_submodule(name.rpartition(".")[0]))
            if parameter.dim() in (2, 4) and isinstance(layout, Layout):
                ranks[name] = min(1 + len(ranks) % 4, *parameter.shape[:2])
                parameter.add_(low_rank(parameter, ranks[name], len(ranks)).to(parameter))
    return target, ranks


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
