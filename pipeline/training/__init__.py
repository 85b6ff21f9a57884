"""Training: the loop, its task and optimizer, checkpoints and cached teacher outputs."""
