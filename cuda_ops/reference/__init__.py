"""What every operation means, in plain PyTorch: the CPU path and the oracle of the kernels' tests."""

from robust.cuda_ops.reference.random import philox

__all__ = ["philox"]
