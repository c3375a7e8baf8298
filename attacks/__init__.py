"""Attacks by name: `get("apgd-t")` is a class, `REGISTRY` the literal table behind it.

Every class of the table is also an attribute of this package, ``from robust.attacks import PGD``, loaded on demand.
"""

from typing import Any

from robust.attacks.base import Attack, Result
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
        "rfgsm": "robust.attacks.whitebox.rfgsm:RFGSM",
        "ffgsm": "robust.attacks.whitebox.ffgsm:FFGSM",
        "llc": "robust.attacks.whitebox.llc:LLC",
        "sigma-zero": "robust.attacks.whitebox.sigma_zero:SigmaZero",
        "deepfool": "robust.attacks.whitebox.deepfool:DeepFool",
        "jsma": "robust.attacks.whitebox.jsma:JSMA",
        "nes": "robust.attacks.blackbox.nes:NES",
        "rays": "robust.attacks.blackbox.rays:RayS",
        "ddn": "robust.attacks.whitebox.ddn:DDN",
        "fmn": "robust.attacks.whitebox.fmn:FMN",
        "pgd-adam": "robust.attacks.whitebox.pgdadam:PGDAdam",
        "eot-pgd": "robust.attacks.whitebox.eotpgd:EOTPGD",
        "tpgd": "robust.attacks.whitebox.tpgd:TPGD",
        "nifgsm": "robust.attacks.whitebox.nifgsm:NIFGSM",
        "vmifgsm": "robust.attacks.whitebox.vmifgsm:VMIFGSM",
        "vnifgsm": "robust.attacks.whitebox.vmifgsm:VNIFGSM",
        "sinifgsm": "robust.attacks.whitebox.nifgsm:SINIFGSM",
        "difgsm": "robust.attacks.whitebox.difgsm:DIFGSM",
        "tifgsm": "robust.attacks.whitebox.tifgsm:TIFGSM",
        "boundary": "robust.attacks.blackbox.boundary:Boundary",
        "sparsefool": "robust.attacks.whitebox.sparsefool:SparseFool",
        "spsa": "robust.attacks.blackbox.spsa:SPSA",
        "simba": "robust.attacks.blackbox.simba:SimBA",
        "bandits": "robust.attacks.blackbox.bandits:Bandits",
        "signhunter": "robust.attacks.blackbox.signhunter:SignHunter",
        "nattack": "robust.attacks.blackbox.nattack:NAttack",
        "genetic": "robust.attacks.blackbox.genetic:GenAttack",
        "jitter": "robust.attacks.whitebox.jitter:Jitter",
        "bb": "robust.attacks.whitebox.bb:BB",
        "cw-l2": "robust.attacks.whitebox.cw:CWL2",
        "one-pixel": "robust.attacks.blackbox.one_pixel:OnePixel",
        "rotation-translation": "robust.attacks.blackbox.rotation_translation:RotationTranslation",
        "zoo": "robust.attacks.blackbox.zoo:ZOO",
        "stadv": "robust.attacks.whitebox.stadv:StAdv",
        "sign-opt": "robust.attacks.blackbox.signopt:SignOPT",
        "alma": "robust.attacks.whitebox.alma:ALMA",
        "ead": "robust.attacks.whitebox.ead:EAD",
        "geoda": "robust.attacks.blackbox.geoda:GeoDA",
        "surfree": "robust.attacks.blackbox.surfree:SurFree",
        "pointwise": "robust.attacks.blackbox.pointwise:Pointwise",
        "salt-pepper": "robust.attacks.blackbox.saltpepper:SaltPepper",
        "gaussian-noise": "robust.attacks.blackbox.gaussiannoise:GaussianNoise",
        "superdeepfool": "robust.attacks.whitebox.superdeepfool:SuperDeepFool",
        "cw-linf": "robust.attacks.whitebox.cw:CWLinf",
        "detector-aware": "robust.attacks.whitebox.detector_aware:DetectorAware",
        "surrogate": "robust.attacks.blackbox.surrogate:Surrogate",
        "uap": "robust.attacks.universal.uap:UAP",
        "targeted-uap": "robust.attacks.universal.targeted_uap:TargetedUAP",
        "patch": "robust.attacks.patch.attack:AdversarialPatch",
        "autoattack": "robust.attacks.autoattack:AutoAttack",
    },
)
get = REGISTRY.load
_CLASSES = {path.partition(":")[2]: name for name, path in REGISTRY.items()}

__all__ = ["REGISTRY", "Attack", "Result", "get", *_CLASSES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """A class of the table by its own name."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return REGISTRY.load(_CLASSES[name])
