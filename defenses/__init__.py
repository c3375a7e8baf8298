"""Defences: transforms, detectors and certificates that wrap a Classifier and say how they must be attacked."""

from robust.registry import Registry

REGISTRY = Registry(
    "defense",
    {
        "mean-smooth": "robust.defenses.transforms.blur:MeanSmooth",
        "gaussian-smooth": "robust.defenses.transforms.blur:GaussianSmooth",
        "median-smooth": "robust.defenses.transforms.median:MedianSmooth",
        "resize-pad": "robust.defenses.transforms.resize:ResizePad",
        "bit-depth": "robust.defenses.transforms.depth:BitDepth",
        "jpeg": "robust.defenses.transforms.jpeg:JPEG",
        "tv-min": "robust.defenses.transforms.tvmin:TVMin",
        "gaussian-noise": "robust.defenses.transforms.noise:GaussianNoise",
        "random-crop": "robust.defenses.transforms.resize:RandomCrop",
        "smoothing": "robust.defenses.certified.smoothing:RandomizedSmoothing",
        "ibp": "robust.defenses.certified.ibp:IBP",
        "crown": "robust.defenses.certified.crown:CROWN",
        "clever": "robust.defenses.certified.clever:CLEVER",
        "feature-squeezing": "robust.defenses.detection.squeezing:FeatureSqueezing",
        "region": "robust.defenses.detection.region:Region",
        "magnet-error": "robust.defenses.detection.magnet:MagNetError",
        "magnet-divergence": "robust.defenses.detection.magnet:MagNetDivergence",
        "mahalanobis": "robust.defenses.detection.mahalanobis:Mahalanobis",
        "lid": "robust.defenses.detection.lid:LID",
        "similarity": "robust.defenses.detection.similarity:Similarity",
    },
)
get = REGISTRY.load
