"""Whether a captured model keeps the documents of a row apart: not every one that takes `position_ids` does."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.compiler.diagnostics import fail
from surgery.compiler.graph import Graph, tensors
from surgery.compiler.kernels.forms import HALF
from surgery.compiler.plan import Plan


def check_documents(plan: Plan, graph: Graph, examples: dict[str, Tensor]) -> None:
    """SURG031 if what a document's logits are depends on the one before it in its row.

    `examples` are those of the capture: rows of two documents each. Other tokens in the first must not show in the
    second; on the meta device nothing can be seen.
    """
    if any(tensor.is_meta for tensor in tensors(graph.module).values()):
        return
    positions, tokens = examples["position_ids"], examples["input_ids"]
    first = positions == torch.arange(positions.shape[1], device=positions.device)
    other = tokens.where(~first, tokens.roll(1, 0))  # the first document of another row
    with torch.no_grad():
        change = graph.module(**examples, training=False) - graph.module(
            **{**examples, "input_ids": other}, training=False
        )
    seen, leaked = change[first].abs().max(), change[~first].abs().max()
    if leaked > (0.05 if change.dtype in HALF else 1e-3) * seen:
        message = "this model does not tell the documents of a packed row apart: each sees those before it"
        place = plan.data.place if plan.data else None
        raise fail("SURG031", message, plan.span(place) if place else None, help="leave `pack = true` out")
