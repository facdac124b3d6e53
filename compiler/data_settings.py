"""The `data` block: settings by name, each with its kind, to the plan's record; and what it says against the task."""

from __future__ import annotations

import re
from collections.abc import Mapping

from surgery.compiler import nodes
from surgery.compiler.diagnostics import Diagnostics, fail
from surgery.compiler.plan import DataPlan, ModelPlan
from surgery.compiler.settings import Reader, at_least, place, read_settings, text, truth, whole, word
from surgery.compiler.span import Span

TEMPLATES = ("chatml", "gemma", "llama-3", "mistral", "phi-3", "zephyr")  # of surgery/runtime/data/templates


def template(node: nodes.Expr) -> str:
    """A template over columns, `"{question} {input}"`, or the bare name of one."""
    if isinstance(node, nodes.Name):
        return f"{{{node.name}}}"
    found = text(node)
    if not re.search(r"\{[^{}]+\}", found.replace("{{", "")):
        help_text = f"`{found}` without quotes is the column" if found.isidentifier() else 'as in "{question}"'
        raise fail("SURG004", "this template names no column", node.span, help=help_text)
    return found


def _eval(node: nodes.Expr) -> tuple[str, str]:
    """A file's name as a text, or a bare word: another split of the same dataset."""
    return ("eval_split", node.name) if isinstance(node, nodes.Name) else ("eval", text(node))


DATA: dict[str, Reader] = {
    "subset": word(),
    "split": word(),
    "text": template,
    "label": word(),
    "prompt": template,
    "completion": template,
    "messages": word(),
    "template": word("tokenizer", *TEMPLATES),
    "loss": word("assistant", "completion", "all"),
    "max_length": whole(1),
    "too_long": word("truncate", "drop", "error"),
    "empty": word("drop", "error"),
    "pack": truth,
    "holdout": at_least(0, below=1),
    "eval": _eval,
    "calibrate": whole(1),
}

# What the rows of a data block are, by the setting that says so: the settings that belong to it, and its `loss`.
FORMS = {
    "text": (("label",), ("all",)),
    "prompt": (("completion",), ("completion", "all")),
    "messages": (("template",), ("assistant", "completion", "all")),
}


def read_data(item: nodes.Data, diagnostics: Diagnostics) -> DataPlan:
    """The `data` block."""
    values = read_settings(item.settings, DATA, "data", diagnostics)
    spans = {setting.name: setting.span for setting in item.settings if isinstance(setting, nodes.Setting)}
    form = _form(item, spans, diagnostics)
    known = {name: value for name, value in values.items() if value is not None}
    if "eval" in known:
        name, value = known.pop("eval")
        known[name] = value
    if "holdout" in known and "eval" in values:
        diagnostics.error("SURG004", "`holdout` and `eval` exclude each other", item.span, help="keep one of them")
    losses = FORMS[form][1]
    if known.setdefault("loss", losses[0]) not in losses:
        message = f"`loss = {known['loss']}` does not fit rows with `{form}`"
        diagnostics.error("SURG004", message, spans["loss"], help=f"there it is {' or '.join(losses)}")
    return DataPlan(path=item.path, place=place(item.span), **known)


def _form(item: nodes.Data, spans: Mapping[str, Span | None], diagnostics: Diagnostics) -> str:
    """Which of `FORMS` the rows have; a setting of another is an error."""
    said = [name for name in FORMS if name in spans] or ["prompt"] * ("completion" in spans)
    if not said:
        help_text = 'text = "{question}", or prompt and completion, or messages = COLUMN'
        if not diagnostics.errors:
            diagnostics.error("SURG004", "`data` must say what the rows are", item.span, help=help_text)
        return "text"
    form, *others = said
    for name in others:
        diagnostics.error("SURG004", f"`{form}` and `{name}` exclude each other", spans[name], help="keep one of them")
    for other, (belonging, _) in FORMS.items():
        for name in belonging:
            if other != form and name in spans:
                help_text = f"rows with `{form}` have no `{name}`"
                diagnostics.error("SURG004", f"`{name}` belongs to `{other}`", spans[name], help=help_text)
    if form == "prompt" and not {"prompt", "completion"} <= spans.keys():
        lacking = "completion" if "prompt" in spans else "prompt"
        message = f"`prompt` and `completion` belong together, `{lacking}` is missing"
        diagnostics.error("SURG004", message, item.span, help=f"{lacking} = COLUMN, or a template over columns")
    return form


def check_data(model: ModelPlan | None, data: DataPlan, item: nodes.Data, diagnostics: Diagnostics) -> None:
    """What a data block says against the model's task; a model that is given in Python may have any."""
    if model is None or model.task is None:
        return
    spans = {setting.name: setting.span for setting in item.settings if isinstance(setting, nodes.Setting)}
    if model.task == "causal_lm":
        if data.label is not None:
            message = "a causal model learns its text; `label` belongs to a classification"
            diagnostics.error("SURG031", message, spans["label"], help="`completion` is what a prompt is answered with")
        return
    for name in ("prompt", "completion", "messages", "pack"):
        if getattr(data, name):
            message = f"`{name}` is for the task causal_lm, not {model.task}"
            diagnostics.error("SURG031", message, spans[name], help="a classification has `text` and `label`")
    if model.task == "sequence_classification" and data.label is None and data.text is not None:
        message = "a classification needs `label`, the column of the classes"
        diagnostics.error("SURG031", message, item.span, help="label = category")
