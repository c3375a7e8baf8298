"""Accountants: how the steps of a private training compose into one epsilon."""

from robust.registry import Registry

REGISTRY = Registry(
    "accountant",
    {
        "pld": "robust.defenses.privacy.accountants.pld:PLD",
        "prv": "robust.defenses.privacy.accountants.prv:PRV",
        "rdp": "robust.defenses.privacy.accountants.rdp:RDP",
        "zcdp": "robust.defenses.privacy.accountants.zcdp:ZCDP",
        "gdp": "robust.defenses.privacy.accountants.gdp:GDP",
    },
)
get = REGISTRY.load
