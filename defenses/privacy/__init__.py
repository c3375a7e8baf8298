"""Differential privacy: optimizers, what a training costs in epsilon, and a ledger that survives crashes."""

from robust.defenses.privacy.accounting import Epsilon, Mechanism, Phase, epsilon, spent
from robust.defenses.privacy.calibrate import Calibration, calibrate
from robust.defenses.privacy.checks import fix
from robust.defenses.privacy.clipping import Adaptive, Automatic, Clipping, PerLayer
from robust.defenses.privacy.ledger import Ledger, LedgerError, read_ledger
from robust.defenses.privacy.monitor import BudgetSpent, Monitor
from robust.defenses.privacy.noise import ExponentialDecay, StepDecay, TimeDecay
from robust.defenses.privacy.optimizer import PrivateOptimizer
from robust.defenses.privacy.private import make_private
from robust.defenses.privacy.sampling import PrivateLoader
from robust.registry import Registry

# What the core, which cannot import this room, needs of it.
REGISTRY = Registry(
    "privacy tool",
    {
        "mechanism": "robust.defenses.privacy.accounting:Mechanism",
        "phase": "robust.defenses.privacy.accounting:Phase",
        "spent": "robust.defenses.privacy.accounting:spent",
        "calibrate": "robust.defenses.privacy.calibrate:calibrate",
        "fix": "robust.defenses.privacy.checks:fix",
        "walk": "robust.defenses.privacy.walk:Walk",
        "read-ledger": "robust.defenses.privacy.ledger:read_ledger",
    },
)
get = REGISTRY.load

__all__ = [
    "REGISTRY",
    "Adaptive",
    "Automatic",
    "BudgetSpent",
    "Calibration",
    "Clipping",
    "Epsilon",
    "ExponentialDecay",
    "Ledger",
    "LedgerError",
    "Mechanism",
    "Monitor",
    "PerLayer",
    "Phase",
    "PrivateLoader",
    "PrivateOptimizer",
    "StepDecay",
    "TimeDecay",
    "calibrate",
    "epsilon",
    "fix",
    "get",
    "make_private",
    "read_ledger",
    "spent",
]
