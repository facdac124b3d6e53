"""`surgery check`: is a spec right?"""

from __future__ import annotations

import re

from surgery.cli.common import CodeOption, Format, FormatOption, SpecArgument, answer, as_json, note, reporting, show
from surgery.compiler.diagnostics import Diagnostic, SurgError

EXAMPLE = "Example: surgery check specs/demo.surg --format json"
NEEDS_ARGUMENTS = True
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def run(spec: SpecArgument, format: FormatOption = Format.text, allow_code: CodeOption = False) -> None:
    """Check a spec: syntax, names, kinds and shapes, and with the model's config the patterns too.

    No weights are loaded and nothing is written. Where the model is on a hub that cannot be reached, the patterns are
    not checked, and a warning says so.
    """
    with reporting(format):
        import surgery
        from surgery.runtime.measure import check_rows

        program = surgery.parse(spec)
        warnings = list(program.warnings)
        if program.model is not None:
            try:
                plan = surgery.plan(program, allow_code=allow_code, numbers="draft")
                if plan.data is not None:
                    check_rows(plan, plan.data.calibrate)
            except SurgError as error:
                warnings += _unreachable(program.model.source, program.model.name, error)
    if format is Format.json:
        answer(as_json(warnings))
    else:
        show(warnings)
        note(f"{spec}: fine")


def _unreachable(source: str, name: str, error: SurgError) -> list[Diagnostic]:
    """A hub that cannot be reached is not the spec's fault: a warning. Everything else is raised again."""
    only_model = all(found.code == "SURG030" for found in error.diagnostics if found.severity == "error")
    if not only_model or source != "hub" or not HUB_NAME.fullmatch(name):
        raise error
    return [
        Diagnostic(
            "SURG030", f"{found.message}; the patterns were not checked", found.span, found.notes, found.help, "warning"
        )  # fmt: skip
        for found in error.diagnostics
    ]
