"""The forward of step.py in module scope: the adapted model itself, whose modules read their own tensors."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.compiler.emit.forward import Forward

_OWN_CACHE = ("causal_lm", "seq2seq_lm")  # tasks whose models keep what they have read, which training does not need


def whole_model(inputs: Sequence[str], task: str | None) -> Forward:
    """`forward(weights, *inputs, training)` that calls `MODEL`, which whoever runs the text puts there."""
    result = "last_hidden_state" if task == "feature_extraction" else "logits"
    given = [f"{name}={name}" for name in inputs] + (["use_cache=False"] if task in _OWN_CACHE else [])
    parameters = ", ".join(f"{name}: Tensor" for name in inputs)
    lines = [
        "MODEL: Any = None  # the adapted model, which whoever runs this text puts here",
        "",
        "",
        f"def forward(weights: Weights, {parameters}, training: bool = True) -> Tensor:",
        f'    """The {result} of the adapted model, whose modules read their own tensors."""',
        "    if MODEL.training != training:",
        "        MODEL.train(training)",
        f"    output: Tensor = MODEL({', '.join(given)}).{result}",
        "    return output",
    ]
    return Forward("\n".join(lines) + "\n", ())
