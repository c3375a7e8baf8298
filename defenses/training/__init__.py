"""Training recipes: losses, with their inner attacks, that `robust.fit` minimises."""

from robust.registry import Registry

REGISTRY = Registry(
    "recipe",
    {
        "pgd-at": "robust.defenses.training.pgd_at:PGDAT",
        "standard": "robust.defenses.training.standard:Standard",
    },
)
get = REGISTRY.load
