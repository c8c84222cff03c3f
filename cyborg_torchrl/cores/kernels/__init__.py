"""Fast kernels in C++ and their loaders. Without a compiler, torch computes the same results more slowly."""
