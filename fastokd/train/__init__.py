"""The training engine: configuration, the step, the loop, checkpoints, metrics and logs."""
