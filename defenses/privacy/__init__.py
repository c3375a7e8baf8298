"""Differentially private training: optimizers, clipping, noise and sampling."""

from robust.defenses.privacy.checks import fix
from robust.defenses.privacy.clipping import Adaptive, Automatic, Clipping, PerLayer
from robust.defenses.privacy.noise import ExponentialDecay, StepDecay, TimeDecay
from robust.defenses.privacy.optimizer import PrivateOptimizer
from robust.defenses.privacy.private import make_private
from robust.defenses.privacy.sampling import PrivateLoader

__all__ = [
    "Adaptive",
    "Automatic",
    "Clipping",
    "ExponentialDecay",
    "PerLayer",
    "PrivateLoader",
    "PrivateOptimizer",
    "StepDecay",
    "TimeDecay",
    "fix",
    "make_private",
]
