"""The compiler: `.surg` text in, a training step out. Start with `pipeline.py`.

`surgery.compiler.rewrite(graph_module, plan)` is the public pass over a captured graph of one's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "surgery.compiler":
    raise ImportError("import surgery.compiler, not compiler")

if TYPE_CHECKING:
    from surgery.compiler.own_graph import rewrite as rewrite

__all__ = ["rewrite"]


def __getattr__(name: str) -> Any:  # torch is imported when it is needed
    if name != "rewrite":
        raise AttributeError(f"module 'surgery.compiler' has no attribute '{name}'")
    from surgery.compiler.own_graph import rewrite

    return rewrite
