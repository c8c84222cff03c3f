"""Kernels for NVIDIA GPUs in Triton. Without Triton, torch computes the same results with many more launches."""
