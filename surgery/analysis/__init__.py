"""What a change of weights can be said with: ranks, bounds and constructed adapters of the difference of two models."""
