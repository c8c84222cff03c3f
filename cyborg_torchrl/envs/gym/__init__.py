"""Adapters for gymnasium environments, in this process and in worker processes."""
