"""Privacy attacks: what a trained model or its updates leak about the data it was trained on."""

from robust.registry import Registry

REGISTRY = Registry(
    "privacy attack",
    {
        "loss": "robust.attacks.privacy.threshold:Loss",
        "entropy": "robust.attacks.privacy.threshold:Entropy",
        "modified-entropy": "robust.attacks.privacy.threshold:ModifiedEntropy",
        "confidence": "robust.attacks.privacy.threshold:Confidence",
        "shadow": "robust.attacks.privacy.shadow:Shadow",
        "lira-online": "robust.attacks.privacy.lira:LiRAOnline",
        "lira-offline": "robust.attacks.privacy.lira:LiRAOffline",
        "rmia": "robust.attacks.privacy.rmia:RMIA",
        "label-only-gap": "robust.attacks.privacy.label_only:Gap",
        "label-only-boundary": "robust.attacks.privacy.label_only:Boundary",
        "learned": "robust.attacks.privacy.learned:Learned",
        "dlg": "robust.attacks.privacy.dlg:DLG",
        "idlg": "robust.attacks.privacy.dlg:IDLG",
        "inverting-gradients": "robust.attacks.privacy.inverting:InvertingGradients",
        "analytic-fc": "robust.attacks.privacy.analytic:AnalyticFC",
        "model-inversion": "robust.attacks.privacy.model_inversion:ModelInversion",
    },
)
get = REGISTRY.load
