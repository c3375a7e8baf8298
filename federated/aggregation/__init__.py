"""Aggregators: one update from many, some of which may be malicious."""

from robust.registry import Registry

REGISTRY = Registry("aggregator", {})
get = REGISTRY.load
