"""Defences: transforms, detectors and certificates that wrap a Classifier and say how they must be attacked."""

from robust.registry import Registry

REGISTRY = Registry("defense", {})
get = REGISTRY.load
