"""Transfer between models: ensembles of surrogates, substitutes of a black box, and who fools whom."""

from robust.registry import Registry

REGISTRY = Registry(
    "transfer tool",
    {
        "ensemble": "robust.attacks.transfer.ensembles:ensemble",
        "pairs": "robust.attacks.transfer.pairs:queried_pairs",
        "distil": "robust.attacks.transfer.substitutes:distil",
        "train": "robust.attacks.transfer.substitutes:train_substitute",
        "matrix": "robust.attacks.transfer.matrix:transfer_matrix",
        "figure": "robust.attacks.transfer.figure:heat_map",
    },
)
get = REGISTRY.load

__all__ = ["REGISTRY", "get"]
