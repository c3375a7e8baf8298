"""Experiments: configurations, cards and recorded results, each repeatable by its name."""

from robust.experiments.benchmarks import REGISTRY as BENCHMARKS
from robust.registry import Registry

REGISTRY = Registry("experiment", {})
get = REGISTRY.load

__all__ = ["BENCHMARKS", "REGISTRY", "get"]
