"""The parts of p5_capture: leave the user's model alone, make the exported graph plain, give causal attention back."""
