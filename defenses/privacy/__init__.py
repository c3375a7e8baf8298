"""Differential privacy: what a training costs in epsilon, budgets that hold, and a ledger that survives crashes."""

from robust.defenses.privacy.accounting import Epsilon, Mechanism, Phase, epsilon, spent
from robust.defenses.privacy.calibrate import Calibration, calibrate
from robust.defenses.privacy.ledger import Ledger, LedgerError, read_ledger
from robust.defenses.privacy.monitor import BudgetSpent, Monitor

__all__ = [
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
    "read_ledger",
    "spent",
]
