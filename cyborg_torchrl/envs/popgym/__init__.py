"""POPGym's environments as batches of tensors, without the package popgym."""
