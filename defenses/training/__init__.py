"""Training recipes: losses, with their inner attacks, that `robust.fit` minimises."""

from robust.registry import Registry

REGISTRY = Registry(
    "recipe",
    {
        "standard": "robust.defenses.training.standard:Standard",
        "gaussian": "robust.defenses.training.gaussian:Gaussian",
        "label-smoothing": "robust.defenses.training.label_smoothing:LabelSmoothing",
        "mixup": "robust.defenses.training.mixup:Mixup",
        "fgsm-at": "robust.defenses.training.fgsm_at:FGSMAT",
        "ensemble-at": "robust.defenses.training.ensemble_at:EnsembleAT",
        "fast": "robust.defenses.training.fast:Fast",
        "free": "robust.defenses.training.free:Free",
        "pgd-at": "robust.defenses.training.pgd_at:PGDAT",
        "trades": "robust.defenses.training.trades:TRADES",
        "mart": "robust.defenses.training.mart:MART",
        "awp": "robust.defenses.training.awp:AWP",
    },
)
get = REGISTRY.load
