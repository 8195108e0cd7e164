"""Training: optimizer, state, the step and its compiled program, the loop, checkpoints, metrics,
pictures."""
