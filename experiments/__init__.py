"""Experiments: configurations, cards and recorded results, each repeatable by its name."""

from robust.registry import Registry

REGISTRY = Registry("experiment", {})
get = REGISTRY.load
