"""The grammar of `.surg`, as data: `surg.lark` is the reference for syntax."""

if __name__ != "surgery.grammar":
    raise ImportError("import surgery.grammar, not grammar")
