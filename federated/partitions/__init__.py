"""Partitions: how a data set is divided among the clients of a simulated federation."""

from robust.registry import Registry

REGISTRY = Registry("partition", {})
get = REGISTRY.load
