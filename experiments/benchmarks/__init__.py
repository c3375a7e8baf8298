"""Benchmarks by name: each checks that it is right before it is fast, and records every repeat with its conditions."""

from robust.registry import Registry

REGISTRY = Registry(
    "benchmark",
    {
        "attacks": "robust.experiments.benchmarks.attacks:Attacks",
        "standard": "robust.experiments.benchmarks.standard:Standard",
        "queries": "robust.experiments.benchmarks.queries:Queries",
        "engine": "robust.experiments.benchmarks.engine:Engine",
        "kernels": "robust.experiments.benchmarks.kernels:Kernels",
        "catalogue": "robust.experiments.benchmarks.catalogue:Catalogue",
        "training": "robust.experiments.benchmarks.training:TrainingStep",
        "smoothing": "robust.experiments.benchmarks.smoothing:Smoothing",
        "privacy": "robust.experiments.benchmarks.private:Private",
    },
)
get = REGISTRY.load

__all__ = ["REGISTRY", "get"]
