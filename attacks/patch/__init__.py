"""The adversarial patch: learnt over random placements, printed, placed in photographs, measured on unseen images."""

from robust.registry import Registry

REGISTRY = Registry("patch tool", {"trained": "robust.attacks.patch.trained:TrainedPatch"})
get = REGISTRY.load

__all__ = ["REGISTRY", "get"]
