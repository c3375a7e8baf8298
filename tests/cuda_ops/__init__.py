"""Tests of the fused operations: their meaning, and that the kernels mean the same."""
