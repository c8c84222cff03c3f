"""Transforms between environment and agent."""
