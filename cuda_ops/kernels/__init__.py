"""Triton kernels: the speed of the operations that `robust.cuda_ops.reference` defines; imported on first use."""
