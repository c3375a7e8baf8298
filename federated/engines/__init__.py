"""Engines: where a federation's clients run; every engine gives the same numbers."""

from robust.registry import Registry

REGISTRY = Registry("federated engine", {})
get = REGISTRY.load
