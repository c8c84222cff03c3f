"""Fast kernels in C++ and their loaders. Without a compiler torch does the same work."""
