"""Differential privacy: what a training costs in epsilon, budgets that hold, and a ledger that survives crashes."""

from robust.defenses.privacy.accounting import Epsilon, Mechanism, Phase, epsilon, spent
from robust.defenses.privacy.calibrate import Calibration, calibrate
from robust.defenses.privacy.ledger import Ledger, LedgerError, read_ledger
from robust.defenses.privacy.monitor import BudgetSpent, Monitor
from robust.registry import Registry

# What the core, which cannot import this room, needs of it.
REGISTRY = Registry(
    "privacy tool",
    {
        "mechanism": "robust.defenses.privacy.accounting:Mechanism",
        "phase": "robust.defenses.privacy.accounting:Phase",
        "spent": "robust.defenses.privacy.accounting:spent",
        "calibrate": "robust.defenses.privacy.calibrate:calibrate",
        "read-ledger": "robust.defenses.privacy.ledger:read_ledger",
    },
)
get = REGISTRY.load

__all__ = [
    "REGISTRY",
    "BudgetSpent",
    "Calibration",
    "Epsilon",
    "Ledger",
    "LedgerError",
    "Mechanism",
    "Monitor",
    "Phase",
    "calibrate",
    "epsilon",
    "get",
    "read_ledger",
    "spent",
]
