"""surgery: a declarative language and compiler for adapting PyTorch models.

    program = surgery.parse("spec.surg")
    plan = surgery.plan(program)
    step = surgery.compile(program)
    result = step(batch)

torch is imported by the first name that needs it, so `import surgery` and the command line's help are quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.api import apply as apply
    from surgery.api import compile as compile
    from surgery.api import load as load
    from surgery.api import parse as parse
    from surgery.api import plan as plan
    from surgery.builders import adapt as adapt
    from surgery.builders import call as call
    from surgery.builders import data as data
    from surgery.builders import freeze as freeze
    from surgery.builders import method as method
    from surgery.builders import model as model
    from surgery.builders import step as step
    from surgery.builders import train as train
    from surgery.compiler.diagnostics import Diagnostic as Diagnostic
    from surgery.compiler.diagnostics import SurgError as SurgError
    from surgery.compiler.plan import Plan as Plan
    from surgery.compiler.program import Program as Program
    from surgery.method_info import methods as methods
    from surgery.runtime.step import TrainingStep as TrainingStep
    from surgery.trainer import TrainerCallback as TrainerCallback

_HOMES = {
    "surgery.api": ("parse", "plan", "compile", "apply", "load"),
    "surgery.method_info": ("methods",),
    "surgery.builders": ("model", "adapt", "method", "train", "freeze", "step", "data", "call"),
    "surgery.compiler.diagnostics": ("Diagnostic", "SurgError"),
    "surgery.compiler.plan": ("Plan",),
    "surgery.compiler.program": ("Program",),
    "surgery.runtime.step": ("TrainingStep",),
    "surgery.trainer": ("TrainerCallback",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'surgery' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
