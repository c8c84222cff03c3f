"""Training: the trainer, builders, runs with checkpoints, evaluation."""
