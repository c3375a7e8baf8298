"""What black-box attacks in phases share: a budget of queries, and images to change."""

from __future__ import annotations

from dataclasses import dataclass

from robust.attacks.base import Attack
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.phases import PhasedRule
from robust.attacks.rule import Setting
from robust.attacks.trial import Trial
from robust.errors import DataError, RobustError


@dataclass(frozen=True, kw_only=True)
class BudgetedAttack(Attack):
    """A black-box attack on images whose rule goes through phases.

    Attributes:
        queries: the most queries per sample, beside the one for the clean point.
    """

    queries: int = 5000

    def build(self, setting: Setting, shape: tuple[int, ...]) -> PhasedRule:
        """The method's rule with this attack's fields, for samples of a shape (C, H, W)."""
        raise TypeError(f"{type(self).__name__} has no rule")

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.queries < 1:
            raise RobustError(f"queries={self.queries} asks nothing; give at least 1")
        if trial.x.dim() != 4:
            raise DataError(f"{type(self).__name__} needs images (N, C, H, W); x is {tuple(trial.x.shape)}")
        run_rule(self.build(setting_of(trial), tuple(trial.x.shape[1:])), trial, make_jobs(trial))
