"""Folders of peft's format, in both directions: what a run learnt as a LoRA, and an adapter of peft as a spec."""
