"""From a model and a batch to a loss: one file per shape of loss."""
