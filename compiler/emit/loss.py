"""The loss in step.py: on whole logits, or, where these are many columns wide, on chunks of their rows."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch

from surgery.compiler.emit.head import Head
from surgery.compiler.graph import TRAINING, Graph
from surgery.runtime import losses
from surgery.runtime.losses import Loss

IMPORTS = {"chunked_loss": "from surgery.compiler.kernels.chunked_loss import chunked_loss"}
WIDE = 8192  # columns from which on logits are cut: 8192 tokens of fewer fit into one chunk
_CHUNK = 28  # the logits of a chunk take at most 2 ** 28 bytes in float32

# The target of each row of the logits, where a loss is the cross entropy of rows.
_TARGETS = {losses.NEXT_TOKEN: losses.next_token_targets, losses.CROSS_ENTROPY: None}


@dataclass(frozen=True)
class LossText:
    """The task's loss: its functions' source, their names, and which output of the forward they read."""

    source: str
    total: str
    count: str
    reads: str  # what stands behind `forward(...)`: "" or "[0]"
    labels: str  # the entry of the batch that the loss compares with
    chunked: bool = False  # the loss takes `hidden_states(...)` in place of an output


def is_by_rows(loss: Loss, graph: Graph) -> bool:
    """Whether a loss could do without whole logits, and these are wide enough for it to matter."""
    output = next(node for node in graph.module.graph.nodes if node.op == "output").args[0]
    value = output.meta.get("val") if isinstance(output, torch.fx.Node) else None
    width = value.shape[-1] if isinstance(value, torch.Tensor) and value.ndim else None
    return loss in _TARGETS and isinstance(width, int) and width >= WIDE


def loss_text(loss: Loss, output: int | None, labels: str, head: Head | None) -> LossText:
    """The source of a loss; in chunks where the forward has a `head`."""
    total, count = loss.total.__name__, loss.count.__name__
    if head is None:
        reads = "" if output is None else f"[{output}]"
        return LossText(_formatted(loss.source), total, count, reads, labels)
    of_rows = _TARGETS[loss]
    before = [inspect.getsource(function) for function in (loss.count, of_rows) if function is not None]
    more = f", {TRAINING}: bool = True" if head.training else ""
    called = f"lambda w, rows: head(w, rows, {TRAINING})" if head.training else "head"
    said = (loss.total.__doc__ or "").split("summed")[0]
    lines = [
        f"CHUNK = 2**{_CHUNK} // (4 * {head.vocabulary})  # rows whose logits take {2 ** (_CHUNK - 20)} MiB in float32",
        "",
        "",
        f"def {total}(weights: Weights, hidden: Tensor, labels: Tensor, count: Tensor{more}) -> Tensor:",
        f'    """{said}summed and divided by `count`.',
        "",
        "    No more than CHUNK rows of logits exist at once.",
        '    """',
        f"    targets = {of_rows.__name__}(labels)" if of_rows else "    targets = labels",
        f"    return chunked_loss({called}, head_weights(weights), hidden, targets, count, CHUNK)",
    ]
    source = _formatted("\n\n".join(before)) + "\n\n" + "\n".join(lines) + "\n"
    return LossText(source, total, count, "", labels, chunked=True)


def _formatted(source: str) -> str:
    """Two functions with the distance that the rest of the file keeps, in its spelling of the same names."""
    source = source.replace("torch.nn.functional.", "F.").replace("torch.Tensor", "Tensor")
    return source.replace("\n\n\ndef ", "\n\ndef ").replace("\n\ndef ", "\n\n\ndef ")
