"""The checks, one question a module."""
