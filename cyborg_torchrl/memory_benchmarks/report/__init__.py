"""One page about many runs: curves, tables, speed, the memory of one agent, and what was run."""
