"""Commands that train, sweep and measure on memory tasks."""
