"""Memory tasks as batched torch environments."""
