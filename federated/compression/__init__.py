"""Compression: updates in fewer bytes on the wire, with what was left out carried to the next round."""

from robust.registry import Registry

REGISTRY = Registry("compression", {})
get = REGISTRY.load
