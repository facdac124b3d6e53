"""Matrix expressions: sizes, shape rules, proved facts, evaluation, cost and lowering to torch."""
