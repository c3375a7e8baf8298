"""A detector that watches queries: black-box attacks ask about many inputs that are nearly the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from robust.classifier import Classifier
from robust.defenses.detection.blinding import Blinded, Blinding
from robust.defenses.detection.encoders import Encoder, below, named, trained, unit
from robust.detector import Detector, Fitted, Learnt
from robust.errors import RobustError
from robust.oracle import Backend
from robust.rng import Draws


class Banned(RobustError):
    """An account whose queries were found to be an attack."""


@dataclass(frozen=True, kw_only=True)
class Similarity(Detector):
    """Stateful detection of attacks (Chen et al. 2019, arXiv:1907.05587): how near a query is to earlier ones.

    An encoder learns, by a contrastive loss, to bring an image and slight changes of it together and others apart. The
    score of a query is minus the mean distance to the k nearest among the account's earlier ones; the first k have
    none, −∞. `score` takes its inputs for one account's queries, in order. An account with a long history has nearer
    neighbours: thresholds come from held-out images each among all others, and hold for histories as long as that.

    Attributes:
        neighbours: k; the paper has 50.
        history: queries that are remembered; the paper has 1,000.
        dimensions, width: of the encoder. epochs: of its training.
    """

    name: ClassVar[str] = "similarity"
    stateful: ClassVar[bool] = True
    usual_fpr: ClassVar[float] = 0.001
    neighbours: int = 50
    history: int = 1000
    dimensions: int = 64
    width: int = 16
    epochs: int = 10

    def __post_init__(self) -> None:
        for key in ("neighbours", "dimensions", "width", "epochs"):
            self.require(getattr(self, key) >= 1, f"{key}={getattr(self, key)} is too few; give 1 or more")
        self.require(
            self.history >= self.neighbours,
            f"history={self.history} is less than neighbours={self.neighbours}",
        )

    def learn(self, clf: Classifier, x: Tensor, y: Tensor, seed: int) -> Learnt:
        """See `Detector.learn`."""
        self.require(len(x) >= 4, f"{len(x)} images are too few to train on; give at least 4")
        module = Encoder(x.shape[1], self.width, self.dimensions)
        weights = trained(module, unit(x, clf.bounds), _contrast, epochs=self.epochs, lr=1e-3, seed=seed)
        return named("encoder", weights)

    def embed(self, clf: Classifier, learnt: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """(N, dimensions) of x."""
        module = Encoder(x.shape[1], self.width, self.dimensions)
        found: Tensor = functional_call(module, below("encoder", learnt), (unit(x, clf.bounds),))
        return found

    def measure(self, clf: Classifier, learnt: Mapping[str, Tensor], x: Tensor, draws: Draws) -> Tensor:
        """See `Detector.measure`; x are one account's queries, in order."""
        codes = torch.cat([self.embed(clf, learnt, part) for part in x.split(256)])
        scores = [self.nearness(codes[k], codes[max(k - self.history, 0) : k]) for k in range(len(codes))]
        return torch.stack(scores)

    def usual(self, fitted: Fitted, x: Tensor) -> Tensor:
        """See `Detector.usual`: of each image among all others, which is what an old account's next query meets."""
        self.require(
            len(x) > self.neighbours, f"{len(x)} held-out images hold no {self.neighbours} neighbours"
        )
        x = x.to(fitted.clf.device, torch.float32)
        codes = torch.cat([self.embed(fitted.clf, fitted.learnt, part) for part in x.split(256)])
        rows = torch.arange(len(codes), device=codes.device)
        return torch.stack(
            [self.nearness(codes[k], codes[rows != k][-self.history :]) for k in range(len(codes))]
        )

    def nearness(self, code: Tensor, earlier: Tensor) -> Tensor:
        """Minus the mean distance of a code (d,) to the k nearest of earlier ones (M, d); −∞ where M < k."""
        if len(earlier) < self.neighbours:
            return code.new_tensor(-torch.inf)
        apart = (earlier - code).square().sum(1).clamp_min(1e-20).sqrt()
        return -apart.topk(self.neighbours, largest=False).values.mean()

    def guard(self, fitted: Fitted, ban: bool = False) -> Guard:
        """See `Guard`."""
        return Guard(fitted, ban=ban)

    def blinded(self, backend: Any, bounds: tuple[float, float], seed: int) -> Blinded:
        """See `Blinded`."""
        return Blinded(backend, bounds, seed=seed)


def _contrast(net: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
    """‖a − a'‖² + max(0, 1 − ‖a − b‖)², a' being a change of a and b another image."""
    changed = Blinding()(x, (0.0, 1.0), Draws(epoch_seed, "contrast", index))
    own, like = net.training_logits(x), net.training_logits(changed)
    near = (own - like).square().sum(1)
    far = (1 - (own - own.roll(1, 0)).square().sum(1).clamp_min(1e-12).sqrt()).clamp_min(0).square()
    return (near + far).mean()


class Guard(Backend):
    """A model's answers to one account, whose queries are watched: the backend of an `Oracle`.

    At a detection the account's history is forgotten, as if the attacker went on with a new one (so the paper counts),
    or, where `ban`, the account gets no further answer.

    Attributes:
        asked: queries so far. detections: the numbers, from 1, of the queries that were flagged.
        scores: of every query.
    """

    def __init__(self, fitted: Fitted, *, ban: bool = False) -> None:
        if not isinstance(fitted.detector, Similarity):
            raise RobustError(f"{fitted.name} watches no queries; a guard needs the detector similarity")
        self.fitted, self.detector, self.ban = fitted, fitted.detector, ban
        self.name, self.bounds = f"{fitted.clf.name}, watched", fitted.clf.bounds
        self.asked, self.detections, self.scores = 0, list[int](), list[float]()
        self._codes: deque[Tensor] = deque(maxlen=self.detector.history)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (N, K) of x.

        Raises:
            Banned: where the account is banned.
        """
        if self.ban and self.detections:
            raise Banned(f"the account was banned after {self.detections[0]} queries, which were too alike")
        with torch.no_grad():
            codes = self.detector.embed(
                self.fitted.clf, self.fitted.learnt, x.to(self.fitted.clf.device).float()
            )
        for code in codes.cpu():
            self._watch(code)
        return self.fitted.clf.logits(x)

    def _watch(self, code: Tensor) -> None:
        self.asked += 1
        ready = len(self._codes) >= self.detector.neighbours
        earlier = torch.stack(list(self._codes)) if ready else code[None][:0]
        score = float(self.detector.nearness(code, earlier))
        self.scores.append(score)
        self._codes.append(code)
        if score > self.fitted.threshold:
            self.detections.append(self.asked)
            self._codes.clear()

    def digest(self) -> str:
        """See `Backend.digest`."""
        return self.fitted.clf.digest()

    def describe(self) -> dict[str, Any]:
        """See `Backend.describe`."""
        return {"detector": self.fitted.describe(), "ban": self.ban}
