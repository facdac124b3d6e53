"""The compiler: `.surg` text in, a training step out. Start with `pipeline.py`."""

if __name__ != "surgery.compiler":
    raise ImportError("import surgery.compiler, not compiler")
