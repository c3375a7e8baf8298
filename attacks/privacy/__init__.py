"""Privacy attacks: what a trained model or its updates leak about the data it was trained on."""

from robust.registry import Registry

REGISTRY = Registry("privacy attack", {})
get = REGISTRY.load
