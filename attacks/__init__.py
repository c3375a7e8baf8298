"""Attacks by name: `get("apgd-t")` is a class, `REGISTRY` the literal table behind it."""

from robust.attacks.base import Attack, Result
from robust.attacks.whitebox.bim import BIM
from robust.attacks.whitebox.fgsm import FGM, FGSM
from robust.attacks.whitebox.mifgsm import MIFGSM
from robust.attacks.whitebox.pgd import PGD
from robust.registry import Registry

REGISTRY = Registry(
    "attack",
    {
        "fgsm": "robust.attacks.whitebox.fgsm:FGSM",
        "fgm": "robust.attacks.whitebox.fgsm:FGM",
        "bim": "robust.attacks.whitebox.bim:BIM",
        "pgd": "robust.attacks.whitebox.pgd:PGD",
        "mifgsm": "robust.attacks.whitebox.mifgsm:MIFGSM",
    },
)
get = REGISTRY.load

__all__ = ["BIM", "FGM", "FGSM", "MIFGSM", "PGD", "REGISTRY", "Attack", "Result", "get"]
