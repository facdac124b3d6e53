"""What runs: starts, the step and its clock, losses, data, run folders, merging, module scope."""
