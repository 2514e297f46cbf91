"""A CUDA runtime whose kernels do nothing: what a GPU program does on the host, without a GPU. See docs/gpu.md."""
