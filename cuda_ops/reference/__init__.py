"""What every operation means, in plain PyTorch: the CPU path and the oracle of the kernels' tests."""

from robust.cuda_ops.reference.aggregation import stacked_mean, stacked_median, trimmed_mean
from robust.cuda_ops.reference.compression import dequantise, quantise, sparsify
from robust.cuda_ops.reference.images import resize_pad, separable_blur
from robust.cuda_ops.reference.losses import loss_gradient
from robust.cuda_ops.reference.privacy import clip_accumulate, noise_update, per_sample_norm
from robust.cuda_ops.reference.random import philox
from robust.cuda_ops.reference.smoothing import noise_batch, vote_counts
from robust.cuda_ops.reference.steps import apgd_l1, apgd_l2, apgd_linf, momentum, step_l1, step_l2, step_linf

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
