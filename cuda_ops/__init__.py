"""Fused operations behind one dispatch: `reference` defines each in plain PyTorch and is the CPU path."""

from robust.cuda_ops.aggregation import stacked_mean, stacked_median, trimmed_mean
from robust.cuda_ops.compression import dequantise, quantise, sparsify
from robust.cuda_ops.images import resize_pad, separable_blur
from robust.cuda_ops.losses import loss_gradient
from robust.cuda_ops.privacy import clip_accumulate, noise_update, per_sample_norm
from robust.cuda_ops.reference import philox
from robust.cuda_ops.smoothing import noise_batch, vote_counts
from robust.cuda_ops.steps import apgd_l1, apgd_l2, apgd_linf, momentum, step_l1, step_l2, step_linf

__all__ = [
    "apgd_l1",
    "apgd_l2",
    "apgd_linf",
    "clip_accumulate",
    "dequantise",
    "loss_gradient",
    "momentum",
    "noise_batch",
    "noise_update",
    "per_sample_norm",
    "philox",
    "quantise",
    "resize_pad",
    "separable_blur",
    "sparsify",
    "stacked_mean",
    "stacked_median",
    "step_l1",
    "step_l2",
    "step_linf",
    "trimmed_mean",
    "vote_counts",
]
