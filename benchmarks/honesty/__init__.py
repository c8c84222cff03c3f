"""Checks of the memory of recurrent libraries, each against the real package: see docs/honesty.md."""
