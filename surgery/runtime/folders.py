"""A folder that appears as a whole, or takes the place of an old one as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to write files into, which becomes `target` once everything is written; else nothing has changed."""
    target = Path(os.path.realpath(target))  # a link stays a link
    fresh, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    if old.exists() and not target.exists():  # a crash came between the two renames below
        os.replace(old, target)
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for path in fresh.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            os.replace(target, old)
        os.replace(fresh, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
