"""The repeated blocks of a model, and which of them the backward runs again (`recompute` in the step block)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from surgery.compiler.diagnostics import fail
from surgery.compiler.plan import Plan, Site
from surgery.compiler.skeleton import Skeleton

Alike = tuple[object, ...]  # equal for blocks that keep equally much


def recomputed(plan: Plan, skeleton: Skeleton) -> tuple[str, ...]:
    """The blocks that the plan's `recompute` chooses; SURG038 if the model repeats none.

    Of n blocks that keep equally much, a share f keeps `floor(f * n)`, evenly spaced, the last one first: nothing of
    the others is held at the peak that the backward of the last one makes.
    """
    setting = plan.step.recompute
    if setting.name == "none":
        return ()
    groups = list(_groups(skeleton, plan))
    if not groups:
        span = None if setting.place is None else plan.span(setting.place)
        help = "leave `recompute` out; a smaller `micro_batch` keeps less too"
        raise fail("SURG038", f"{type(skeleton.model).__name__} has no list of repeated blocks", span, help=help)
    chosen = {path for group in groups for path in _run_again(group, setting.share)}
    return tuple(path for path in skeleton.modules if path in chosen)


def _run_again(group: Sequence[str], share: float) -> list[str]:
    kept = int(share * len(group) + 1e-9)  # 0.3 of 10 are 3, though 0.3 * 10 may be rounded down
    counts = [number * kept // len(group) for number in range(len(group) + 1)]
    return [path for path, before, after in zip(group, counts, counts[1:], strict=False) if before == after]


def _groups(skeleton: Skeleton, plan: Plan) -> Iterable[list[str]]:
    """The blocks of each repeated list, those together that keep equally much."""
    for blocks in stacks(skeleton):
        alike: dict[Alike, list[str]] = {}
        for path in blocks:
            alike.setdefault((_structure(skeleton.modules[path]), *_trained(path, plan)), []).append(path)
        yield from alike.values()


def stacks(skeleton: Skeleton) -> list[list[str]]:
    """The outermost lists that hold a block twice: paths of their blocks, `model.layers.0` to the last.

    Stages that differ in size hold such lists themselves; where there are none, blocks of one class are alike.
    """
    lists: dict[str, list[str]] = {}
    for path, module in skeleton.modules.items():
        stack, _, index = path.rpartition(".")
        if stack and index.isdecimal() and any(True for _ in module.children()):
            lists.setdefault(stack, []).append(path)
    for alike in (_structure, type):
        found: dict[str, list[str]] = {}
        for stack, blocks in lists.items():
            repeated = len({alike(skeleton.modules[path]) for path in blocks}) < len(blocks)
            if repeated and not any(stack.startswith(f"{path}.") for outer in found.values() for path in outer):
                found[stack] = blocks
        if found:
            break
    return list(found.values())


def _structure(module: nn.Module) -> Alike:
    """Class, and the names and shapes of the parameters."""
    return type(module), *((name, parameter.shape) for name, parameter in module.named_parameters())


def _trained(path: str, plan: Plan) -> Iterable[Alike]:
    """What the plan does inside a block: sites by their place there, and whole parameters."""
    inside = f"{path}."
    yield tuple(_said(site, inside) for site in plan.sites if site.path.startswith(inside))
    yield tuple(whole.name[len(inside) :] for whole in plan.trained if whole.name.startswith(inside))


def _said(site: Site, inside: str) -> Alike:
    return site.path[len(inside) :], site.method, site.strategy
