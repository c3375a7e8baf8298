"""A verdict: per-sample outcomes with the adversarial examples as evidence, stored so that others can check it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from robust.adaptive import ATTACK, STEPS, declared_kinds
from robust.classifier import Classifier
from robust.digest import read_json
from robust.errors import RobustError, RunError
from robust.journal import PLAN, SAMPLES, Record, read_pages
from robust.oracle import Oracle
from robust.threat import Threat, make_threat
from robust.verify import check_files
from robust.verify import verify as verify_verdict

_UNREADABLE = (RobustError, OSError, LookupError, ValueError, TypeError, AttributeError, SafetensorError)


@dataclass
class Samples:
    """Outcomes of N samples as columns, built from a journal's records.

    Attributes:
        y, digest: label and data digest; prediction, confidence, correct: on the clean point.
        broken_by: the attack that broke it, None if none did or it was wrong from the start.
        eps: smallest radius at which it fell, inf if it did not.
        distance: of its example, NaN without one; adversarial_prediction (-1), adversarial_confidence likewise.
        marginal: whether the outcome is within float noise.
        fallen: how many fell to each attack that does not know of the model's defence (`robust.adaptive`).
    """

    y: list[int] = field(default_factory=list)
    digest: list[str] = field(default_factory=list)
    prediction: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    broken_by: list[str | None] = field(default_factory=list)
    eps: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    adversarial_prediction: list[int] = field(default_factory=list)
    adversarial_confidence: list[float] = field(default_factory=list)
    marginal: list[bool] = field(default_factory=list)
    fallen: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Mapping[str, Sequence[Record]]) -> Samples:
        """The outcomes of a journal's groups, in their order."""
        samples = cls()
        for records in groups.values():
            for record in records:
                samples.take(record)
        return samples

    def take(self, record: Record) -> None:
        """Adds a sample's clean outcome, or updates it with the attack that broke it."""
        if "non_adaptive" in record:
            kind = record["non_adaptive"]
            self.fallen[kind] = self.fallen.get(kind, 0) + 1
            if "broken_by" not in record:  # it had fallen before
                return
        if "broken_by" not in record:
            if record["i"] != len(self.y):
                raise RunError(f"samples.jsonl has sample {record['i']} where {len(self.y)} belongs")
            self.y.append(record["y"])
            self.digest.append(record["x"])
            self.prediction.append(record["prediction"])
            self.confidence.append(record["confidence"])
            self.correct.append(record["correct"])
            self.marginal.append(record["marginal"])
            self.broken_by.append(None)
            self.eps.append(math.inf)
            self.distance.append(math.nan)
            self.adversarial_prediction.append(-1)
            self.adversarial_confidence.append(math.nan)
            return
        i = record["i"]
        self.broken_by[i], self.eps[i] = record["broken_by"], record["eps"]
        self.distance[i] = record["distance"]
        self.adversarial_prediction[i] = record["prediction"]
        self.adversarial_confidence[i] = record["confidence"]
        self.marginal[i] = record["marginal"]

    def accuracy(self, eps: float) -> float:
        """Fraction of all samples that are correct and do not fall within `eps`."""
        kept = sum(right and fell > eps for right, fell in zip(self.correct, self.eps, strict=True))
        return kept / max(len(self.y), 1)


class Verdict:
    """What `evaluate` returns and `Verdict.load` reads back.

    Attributes:
        threat: the largest threat evaluated; suite: the suite that really ran.
        clean_accuracy, robust_accuracy: fractions in [0, 1] of all samples.
        correct, robust: (N,) bool; labels, clean_predictions, adversarial_predictions: (N,) int64.
        broken_by: per sample the attack's name or None; eps_broken, distance: (N,) float64.
        adversarial: (M, C, H, W) float32 evidence, of the samples `adversarial_index` (M,).
        curve: (eps, robust accuracy) pairs, ascending.
        cost, warnings, manifest: see `manifest.json`.
        out: the run folder, or None.
    """

    def __init__(
        self,
        samples: Samples,
        index: Tensor,
        adversarial: Tensor,
        manifest: dict[str, Any],
        out: Path | None = None,
    ) -> None:
        self.samples, self.manifest, self.out = samples, manifest, out
        self.adversarial_index, self.adversarial = index, adversarial
        radii: list[float] = manifest["threat"]["eps"]
        self.threat: Threat = make_threat(manifest["threat"]["norm"], radii[-1])
        self.suite: str = manifest["suite"]["name"]
        self.seed: int = manifest["seed"]
        self.clean_accuracy: float = sum(samples.correct) / max(len(samples.y), 1)
        self.curve: list[tuple[float, float]] = [(eps, samples.accuracy(eps)) for eps in radii]
        self.robust_accuracy: float = self.curve[-1][1]
        self.correct = torch.tensor(samples.correct, dtype=torch.bool)
        self.eps_broken = torch.tensor(samples.eps, dtype=torch.float64)
        self.robust = self.correct & (self.eps_broken > radii[-1])
        self.labels = torch.tensor(samples.y, dtype=torch.long)
        self.clean_predictions = torch.tensor(samples.prediction, dtype=torch.long)
        self.adversarial_predictions = torch.tensor(samples.adversarial_prediction, dtype=torch.long)
        self.distance = torch.tensor(samples.distance, dtype=torch.float64)
        self.marginal = torch.tensor(samples.marginal, dtype=torch.bool)
        self.broken_by: list[str | None] = samples.broken_by
        self.cost: dict[str, float] = manifest["cost"]
        self.warnings: list[str] = manifest["warnings"]

    def __len__(self) -> int:
        return len(self.samples.y)

    def __repr__(self) -> str:
        eps = float(self.threat.eps)
        return (
            f"Verdict(clean {self.clean_accuracy:.1%}, robust {self.robust_accuracy:.1%} at {self.threat.norm} "
            f"{eps:.4g}, suite {self.suite}, n={len(self)}, {len(self.warnings)} doubts)"
        )

    def points(self, x: Tensor) -> Tensor:
        """(N, C, H, W): the adversarial example of each broken sample, the clean point of x of the others."""
        points = x.detach().cpu().float().clone()
        if len(self.adversarial_index):
            points[self.adversarial_index] = self.adversarial
        return points

    @property
    def non_adaptive(self) -> dict[str, Any] | None:
        """What attacks that do not know of the defence would have claimed; None without a defence.

        `attack`, `steps`; by `replay` and, where it was measured, `naive`, the accuracy under each (`robust.adaptive`);
        `claimed`, the larger one, and by how much it `overstated` the robust accuracy.
        """
        kinds = declared_kinds(self.manifest.get("defenses", []))
        if not kinds:
            return None
        right, n = int(self.correct.sum()), max(len(self), 1)
        left = {kind: (right - self.samples.fallen.get(kind, 0)) / n for kind in kinds}
        claimed = max(left.values())
        about = {"attack": ATTACK, "steps": STEPS, "eps": self.curve[-1][0], **left, "claimed": claimed}
        return {**about, "overstated": claimed - self.robust_accuracy}

    def results(self) -> dict[str, Any]:
        """The manifest's claims, counted from the samples."""
        beside = self.non_adaptive
        return {
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "curve": [list(pair) for pair in self.curve],
            "correct": int(self.correct.sum()),
            "robust": int(self.robust.sum()),
            "marginal": int(self.marginal.sum()),
            **({} if beside is None else {"non_adaptive": beside}),
        }

    def summary(self) -> dict[str, Any]:
        """The one JSON object of ``robust eval --json``."""
        return {
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "n": len(self),
            "threat": self.manifest["threat"],
            "suite": self.suite,
            "defenses": self.manifest.get("defenses", []),
            "non_adaptive": self.non_adaptive,
            "seconds": self.cost["seconds"],
            "curve": self.curve,
            "cost": self.cost,
            "warnings": self.warnings,
            "out": None if self.out is None else str(self.out),
        }

    @classmethod
    def load(cls, out: str | Path) -> Verdict:
        """Reads a finished run folder; whether it is still what was written, `verify` says.

        Raises:
            RunError: the folder is missing, unfinished or unreadable.
            VerificationError: it is unreadable because a file is missing or was altered.
        """
        folder = Path(out)
        if not folder.is_dir():
            raise RunError(f"{folder} is no run folder")
        begun = (folder / PLAN).exists() or not (folder / "manifest.json").exists()
        if begun and not (folder / "digests.json").exists():
            raise RunError(f"{folder} is not a finished run; continue it with --resume")
        try:
            return cls._read(folder)
        except _UNREADABLE as error:
            check_files(folder)
            raise RunError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error

    @classmethod
    def _read(cls, folder: Path) -> Verdict:
        manifest = read_json(folder / "manifest.json")
        raw = (folder / SAMPLES).read_bytes()
        pages = read_pages(raw)
        if pages.end < len(raw):
            raise RunError(f"{SAMPLES} is broken after byte {pages.end}")
        tensors = load_file(folder / "adversarial.safetensors")
        return cls(Samples.of(pages.groups), tensors["index"], tensors["adversarial"], manifest, folder)

    def verify(self, model: Classifier | Oracle, x: Any, y: Tensor | None = None) -> dict[str, Any]:
        """Re-checks the stored evidence against the model and the data; see `robust.verify`.

        Returns:
            Counts of what was checked, and the marginal samples whose outcome differs here.

        Raises:
            VerificationError: anything else differs, with what and where.
        """
        return verify_verdict(self, model, x, y)
