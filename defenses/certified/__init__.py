"""Certificates: what is promised of every point near a sample; the rows are in `robust.defenses`."""

from robust.defenses.certified.clever import CLEVER
from robust.defenses.certified.crown import CROWN
from robust.defenses.certified.ibp import IBP
from robust.defenses.certified.smoothing import RandomizedSmoothing

__all__ = ["CLEVER", "CROWN", "IBP", "RandomizedSmoothing"]
