"""Fused operations behind one dispatch: `reference` defines each in plain PyTorch and is the CPU path."""

from robust.cuda_ops.reference import philox

__all__ = ["philox"]
