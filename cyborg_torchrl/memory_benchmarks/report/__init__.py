"""One HTML page about runs: learning curves, results, speed, the memory of one agent, and a list of the runs."""
