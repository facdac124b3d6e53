"""An adapter of peft as a program of the language, and as a run: the same model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery import builders
from surgery.compiler import nodes, p1_parse
from surgery.compiler.diagnostics import Diagnostics, SurgError, did_you_mean, fail
from surgery.compiler.pattern import matches, parse_pattern
from surgery.compiler.plan import ModelPlan
from surgery.compiler.printer import show
from surgery.compiler.span import Source
from surgery.compiler.weights import Layout, module_layout
from surgery.peft.contents import contents_of, names_of, ties_of
from surgery.peft.kinds import KINDS, Kind, Layer, Reading, Unsupported, check_settings
from surgery.peft.names import HEADS, TASKS
from surgery.peft.patterns import patterns_of
from surgery.peft.read import Folder, broken, read_folder
from surgery.runtime.models import CLASSES, load_skeleton

if TYPE_CHECKING:
    from surgery.runtime.step import TrainingStep

LABELLED = ("sequence_classification", "token_classification")


@dataclass(frozen=True)
class Imported:
    """A program's text, and what an adapter holds for it: tensors of sites by name, and whole parameters.

    `base` are weights of the model that the adapter repeats, for them to be compared.
    """

    text: str
    sites: int
    tensors: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)


def import_adapter(
    path: Path, folder: Path, model: str | None = None, task: str | None = None, more: str = ""
) -> Imported:
    """Read an adapter (its folder or its config) as a program that lies in `folder`, with more text behind its own.

    `model` and `task` stand for what the config says of them, or does not. Raises SURG065, with all the reasons, where
    the language has no counterpart, and SURG030 where only the model tells what is meant and it cannot be had.
    """
    given = read_folder(path)
    kind = KINDS.get(given.type)
    if kind is None:
        help = did_you_mean(given.type, KINDS)
        raise broken(given.path, f"`peft_type = {given.type}` has no counterpart here", help)
    found = Diagnostics()
    line = _model_line(given, folder, model, task)
    try:
        skeleton: nn.Module | None = load_skeleton(line, folder)
    except SurgError:
        if given.tensors is None or given.config.get("target_parameters"):
            raise
        skeleton = None
    contents = contents_of(given, kind, skeleton)
    readings: dict[str, Reading] = {}
    aliases: dict[str, str] = {}
    unknown = [*check_settings(kind, given.config), *contents.unknown]
    for layer in contents.layers:
        try:
            reading = _reading(kind, skeleton, layer)
        except Unsupported as reason:
            unknown.append(reason)
        else:
            readings |= {layer.path: reading} if reading else {}
    try:
        aliases = _aliases(readings, skeleton)
    except Unsupported as reason:
        unknown.append(reason)
    for problem in unknown:
        message = f"the {given.type} of `{given.path}` cannot be imported: `{problem.key}`: {problem}"
        found.error("SURG065", message, help="use it with peft, or merge it there")
    found.raise_errors()
    if not readings:
        raise broken(given.path, "it adapts no module")
    trained = [builders.train(pattern) for pattern in patterns_of(contents.kept)]
    items = [*_methods(readings), _written(line), *_rules(readings, aliases, skeleton), *trained]
    tensors = {path: reading.tensors for path, reading in readings.items() if reading.tensors}
    text = f"# Imported from an adapter of peft ({given.type}).\n{show(nodes.Tree(tuple(items)))}"
    text += f"\n{more}" if more else ""
    return Imported(text, len(readings), tensors, contents.whole, contents.base)


# --- the model --------------------------------------------------------------------------------------------------------


def _model_line(given: Folder, folder: Path, model: str | None, task: str | None) -> ModelPlan:
    name = model or given.config.get("base_model_name_or_path")
    if not name:
        raise broken(given.path, "it names no `base_model_name_or_path`", "give the model: --model NAME")
    if Path(name).is_dir() and not Path(name).is_absolute():  # a path counts from the spec
        name = os.path.relpath(name, folder)
        name = name if name.startswith(".") else f"./{name}"
    task = task or _task(given)
    labels = _labels(given) if task in LABELLED else None
    return ModelPlan(source="hub", name=name, task=task, labels=labels, revision=given.config.get("revision"))


def _task(given: Folder) -> str:
    import transformers

    kind, mapping = given.config.get("task_type"), given.config.get("auto_mapping") or {}
    for task, name in TASKS.items():
        if name == kind:
            return task
    for task, name in CLASSES.items() if kind is None else ():
        known = getattr(transformers, name)._model_mapping._model_mapping.values()
        if any(mapping.get("base_model_class") in (one if isinstance(one, tuple) else (one,)) for one in known):
            return task
    raise broken(given.path, f"`task_type = {kind}` has no counterpart here", f"give one: --task {'|'.join(CLASSES)}")


def _labels(given: Folder) -> int | None:
    """How many classes a head has that the adapter holds, None if it holds none."""
    heads = HEADS["SEQ_CLS"]
    found = [
        tensor.shape[0]
        for key, tensor in (given.tensors or {}).items()
        if key.endswith(".weight") and any(f".{head}." in key for head in heads)
    ]
    return found[-1] if found else None


def _written(line: ModelPlan) -> nodes.Model:
    task: Any = line.task if line.labels is None else builders.call(str(line.task), labels=line.labels)
    revision = {} if line.revision is None else {"revision": line.revision}
    return builders.model(line.name, task=task, **revision)


def _reading(kind: Kind, skeleton: nn.Module | None, layer: Layer) -> Reading | None:
    """A module in the language, None if nothing of it is left. Raises Unsupported."""
    modules = {} if skeleton is None else dict(skeleton.named_modules())
    layout = module_layout(modules[layer.path]) if layer.path in modules else None
    if skeleton is not None and layer.path not in modules and layer.path not in names_of(skeleton):
        raise Unsupported(layer.path, f"{type(skeleton).__name__} has no such module")
    if isinstance(layout, Layout) and layout.module_class not in kind.classes:
        raise Unsupported("target_modules", f"`{layer.path}` is a {layout.module_class}")
    return kind.read(layer)


# --- the program ------------------------------------------------------------------------------------------------------


def _methods(readings: Mapping[str, Reading]) -> Iterator[nodes.Item]:
    for text in dict.fromkeys(reading.text for reading in readings.values() if reading.text):
        yield from p1_parse.run(Source("<method>", text)).items


def _aliases(readings: dict[str, Reading], skeleton: nn.Module | None) -> dict[str, str]:
    """`tie` or `untie` for the sites whose weight is tied; of two that are adapted alike one is taken out."""
    aliases: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    ties = ties_of(skeleton)
    for path in readings:
        if path in ties:
            groups.setdefault(ties[path], []).append(path)
    for paths in groups.values():  # a `tie` is in the head's name
        paths.sort(key=lambda path: skeleton is not None and isinstance(skeleton.get_submodule(path), nn.Embedding))
        aliases[paths[0]] = "untie"
        if len(paths) > 1:
            first, second = (readings[path] for path in paths[:2])
            if len(paths) > 2 or show(first.call) != show(second.call) or not _turned(first.tensors, second.tensors):
                names = " and ".join(f"`{path}`" for path in paths)
                raise Unsupported("target_modules", f"{names} are tied, and each is adapted in its own way")
            aliases[paths[0]] = "tie"
            del readings[paths[1]]
    return aliases


def _turned(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two pairs of factors are those of a matrix and of its transpose."""
    return (
        first.keys() == second.keys() == {"A", "B"}
        and first["A"].shape == second["B"].mT.shape
        and torch.equal(first["A"], second["B"].mT)
        and torch.equal(first["B"], second["A"].mT)
    )


def _rules(
    readings: Mapping[str, Reading], aliases: Mapping[str, str], skeleton: nn.Module | None
) -> Iterator[nodes.Item]:
    """A rule for every method with its arguments and every pattern of its sites."""
    names = None if skeleton is None else [*(path for path, _ in skeleton.named_modules()), *names_of(skeleton)]
    groups: dict[tuple[str, str | None], list[str]] = {}
    for path, reading in readings.items():
        groups.setdefault((show(reading.call), aliases.get(path)), []).append(path)
    for (_, alias), paths in groups.items():
        for pattern in patterns_of(paths, names):
            parts = parse_pattern(nodes.Pattern(pattern))
            count = sum(matches(parts, path) for path in paths)
            yield builders.adapt(pattern, readings[paths[0]].call, expect=count, alias=alias)


# --- the run ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_tensors(step: TrainingStep, imported: Imported, path: Path) -> None:
    """Put an adapter's tensors into the step of its program. Raises SURG065 for what does not fit the model."""
    for site, tensors in imported.tensors.items():
        own = step.parameters_by_site.get(site, {})
        for name, tensor in tensors.items():
            _put(path, f"{site}.{name}", own.get(name), tensor)
    for name, tensor in imported.whole.items():
        _put(path, name, step.weights.get(name), tensor)
    for name, tensor in imported.whole.items():  # what is tied was written twice
        if not torch.equal(step.weights[name].detach().cpu(), tensor.to(step.weights[name].dtype)):
            raise broken(path, f"`{name}` is tied to another parameter, of which the adapter holds another value")
    for name, tensor in imported.base.items():
        own_weight = step.model.get_parameter(name).detach().cpu()
        if own_weight.shape != tensor.shape or not torch.equal(own_weight, tensor.to(own_weight.dtype)):
            raise broken(path, f"its `{name}` is not that of the model: it was made for another one")


def _put(path: Path, name: str, own: Tensor | None, tensor: Tensor) -> None:
    if own is None or own.shape != tensor.shape:
        wanted = "the model has none" if own is None else f"the model's is {list(own.shape)}"
        raise broken(path, f"its `{name}` is {list(tensor.shape)}, and {wanted}")
    own.copy_(tensor)


def save_run(imported: Imported, adapter: Path, spec: Path, run: Path) -> TrainingStep:
    """Write the run folder of an imported adapter, at step 0; `spec` is where its program is, or will be."""
    import surgery

    if not imported.tensors:
        raise fail("SURG065", f"`{adapter}` has no tensors, so there is no run to make", help="leave out --run")
    step = surgery.compile(surgery.parse(imported.text, spec.parent, spec.name), device="cpu")
    load_tensors(step, imported, adapter)
    step.save(run)
    return step
