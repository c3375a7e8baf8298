"""Metrics: numbers that summarise a verdict, an attack or a defence, each by name."""

from robust.registry import Registry

REGISTRY = Registry("metric", {"psnr": "robust.similarity:psnr", "ssim": "robust.similarity:ssim"})
get = REGISTRY.load
