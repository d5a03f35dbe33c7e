"""Training as a fold: `(state, batch) -> (state, metrics)`, with evaluation, checkpoints and records round it."""
