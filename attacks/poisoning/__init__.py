"""Poisoning attacks: training data made to plant a backdoor or to ruin a model."""

from robust.registry import Registry

REGISTRY = Registry("poisoning attack", {})
get = REGISTRY.load
