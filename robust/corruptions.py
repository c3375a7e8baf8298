"""Corruptions: natural damage to images at five severities, each by name."""

from robust.registry import Registry

REGISTRY = Registry("corruption", {})
get = REGISTRY.load
