"""Optimizations of a graph, one per file: the same values for fewer operations and less memory."""
