"""What `python -m cyborg_torchrl` offers: one module for each command."""
