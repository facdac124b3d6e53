"""From the rewritten graph to Python: outlining, printing, and the text of step.py."""
