"""Attacks by name: `get("apgd-t")` is a class, `REGISTRY` the literal table behind it."""

from robust.attacks.autoattack import AutoAttack
from robust.attacks.base import Attack, Result
from robust.attacks.blackbox.square import Square
from robust.attacks.whitebox.apgd import APGDCE, APGDDLR, APGDT
from robust.attacks.whitebox.bim import BIM
from robust.attacks.whitebox.fab import FAB, FABT
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
        "apgd-ce": "robust.attacks.whitebox.apgd:APGDCE",
        "apgd-dlr": "robust.attacks.whitebox.apgd:APGDDLR",
        "apgd-t": "robust.attacks.whitebox.apgd:APGDT",
        "fab": "robust.attacks.whitebox.fab:FAB",
        "fab-t": "robust.attacks.whitebox.fab:FABT",
        "square": "robust.attacks.blackbox.square:Square",
        "hopskipjump": "robust.attacks.blackbox.hopskipjump:HopSkipJump",
        "autoattack": "robust.attacks.autoattack:AutoAttack",
    },
)
get = REGISTRY.load

__all__ = [
    "APGDCE",
    "APGDDLR",
    "APGDT",
    "BIM",
    "FAB",
    "FABT",
    "FGM",
    "FGSM",
    "MIFGSM",
    "PGD",
    "REGISTRY",
    "Attack",
    "AutoAttack",
    "Result",
    "Square",
    "get",
]
