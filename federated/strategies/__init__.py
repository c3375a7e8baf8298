"""Federated strategies: how a server turns a round of client updates into the next model."""

from robust.registry import Registry

REGISTRY = Registry("federated strategy", {})
get = REGISTRY.load
