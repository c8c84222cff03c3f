"""Training runs: trainer, builders, run folder, checkpoints, evaluation."""
