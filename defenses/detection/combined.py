"""Numbers of several layers made one, by a logistic regression on clean, noisy and adversarial images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust.attacks import get
from robust.classifier import Classifier
from robust.defenses.detection.features import features, layers
from robust.detector import Detector, Learnt
from robust.rng import Draws
from robust.threat import Linf

_LEAST = 20  # images: fewer tell nothing


@dataclass(frozen=True, kw_only=True)
class Layered(Detector):
    """A detector that looks at several layers: a number of each, weighted by a logistic regression.

    What is suspicious is learnt from adversarial images that the detector makes itself, against clean ones and ones
    with as much random noise.

    Attributes:
        layers: how many weighted layers are looked at, evenly spread, the last included.
        attack: makes the adversarial images; a white-box attack's name.
        eps: how far they go, in linf and the unit of x.
    """

    layers: int = 4
    attack: str = "pgd"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        self.require(self.layers >= 1, f"layers={self.layers} shows nothing; give 1 or more")
        self.require(0 < self.eps < float("inf"), f"eps={self.eps} changes nothing; give one above 0")
        kind = get(self.attack)
        fits = kind.knowledge == "white" and "linf" in kind.norms and not kind.universal
        self.require(fits, f"attack={self.attack} makes no examples in linf from gradients; take pgd or fgsm")

    def learn(self, clf: Classifier, x: Tensor, y: Tensor, seed: int) -> Learnt:
        """See `Detector.learn`: statistics from the first 70 % of the images, the regression from the others."""
        self.require(len(x) >= _LEAST, f"{len(x)} images are too few to learn from; give at least {_LEAST}")
        cut = max(int(0.7 * len(x)), 1)
        modules = layers(clf, x, self.layers)
        learnt = self.statistics(clf, x[:cut], y[:cut], modules, seed)
        everything = list(clf.module.modules())
        learnt["layers"] = torch.tensor([everything.index(module) for module in modules])
        negative, positive = self._examples(clf, x[cut:], y[cut:], seed)
        values = [self._numbers(clf, learnt, part, modules) for part in (negative, positive)]
        return {**learnt, **regression(*values)}

    def statistics(
        self, clf: Classifier, x: Tensor, y: Tensor, modules: list[nn.Module], seed: int
    ) -> Learnt:
        """What the layers' numbers rest on, from clean images."""
        raise NotImplementedError(f"{type(self).__name__} learns nothing")

    def number(self, learnt: Mapping[str, Tensor], layer: int, values: Tensor) -> Tensor:
        """(N,) what one layer's features (N, d) say."""
        raise NotImplementedError(f"{type(self).__name__} says nothing of a layer")

    def measure(self, clf: Classifier, learnt: Mapping[str, Tensor], x: Tensor, draws: Draws) -> Tensor:
        """See `Detector.measure`: the log-odds of being adversarial."""
        everything = list(clf.module.modules())
        modules = [everything[place] for place in learnt["layers"].tolist()]
        return _odds(learnt, self.numbers(clf, learnt, x, modules))

    def numbers(
        self, clf: Classifier, learnt: Mapping[str, Tensor], x: Tensor, modules: list[nn.Module]
    ) -> Tensor:
        """(N, layers) of x."""
        _, found = features(clf, x, modules)
        return torch.stack([self.number(learnt, k, values) for k, values in enumerate(found)], 1)

    def _numbers(
        self, clf: Classifier, learnt: Mapping[str, Tensor], x: Tensor, modules: list[nn.Module]
    ) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.numbers(clf, learnt, part, modules) for part in x.split(64)])

    def _examples(self, clf: Classifier, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Clean and noisy images, and adversarial ones: those of right images that the attack broke, if any."""
        result = get(self.attack)(threat=Linf(self.eps)).run(clf, x, y, seed=seed)
        right = torch.cat([clf.logits(part).argmax(1) for part in x.split(64)]) == y
        broken = result.success.to(x.device) & right
        chosen = broken if bool(broken.any()) else torch.ones_like(broken)
        signs = Draws(seed, f"{self.name}/noise", torch.arange(len(x), device=x.device)).signs(*x.shape[1:])
        noisy = (x + self.eps * signs.to(x)).clamp(*clf.bounds)
        return torch.cat([x, noisy]), result.x_adv.to(x)[chosen]


Numbers = Callable[[Tensor], Tensor]


def regression(negative: Tensor, positive: Tensor) -> Learnt:
    """Weights of a logistic regression (l2, balanced) that tells (M, layers) of positives from negatives, by name."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    values = torch.cat([negative, positive]).double().cpu()
    mean, deviation = values.mean(0), values.std(0).clamp_min(1e-12)
    labels = np.concatenate([np.zeros(len(negative)), np.ones(len(positive))])
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    model.fit(((values - mean) / deviation).numpy(), labels)
    found = {
        "mean": mean,
        "deviation": deviation,
        "weight": torch.from_numpy(model.coef_[0].copy()),
        "bias": torch.from_numpy(model.intercept_.copy()),
    }
    return {f"combined/{name}": value.float().to(negative.device) for name, value in found.items()}


def _odds(learnt: Mapping[str, Tensor], numbers: Tensor) -> Tensor:
    scaled = (numbers - learnt["combined/mean"]) / learnt["combined/deviation"]
    odds: Tensor = scaled @ learnt["combined/weight"] + learnt["combined/bias"]
    return odds
