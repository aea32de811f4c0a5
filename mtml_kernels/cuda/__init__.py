"""CUDA C++ kernels, and what prepares their work."""
