"""The training loop and its parts: optimizers, schedules, state, checkpoints, reports."""
