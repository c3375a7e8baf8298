"""The folder of a detection run: parts that are there whole or not at all, and are never made twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust.classifier import Classifier
from robust.detector import RECORD as DETECTOR
from robust.detector import Fitted, load_detector
from robust.part_store import PartStore


class Store(PartStore):
    """The parts of one run, in a folder or nowhere; see `robust.part_store.PartStore`."""

    def __init__(
        self,
        out: Path | None,
        identity: Mapping[str, Any],
        resume: bool,
        attacks: Mapping[str, Mapping[str, Any]],
    ) -> None:
        super().__init__(out, identity, resume, attacks, ("points", "scores", "detectors"))

    def detector(self, name: str, clf: Classifier) -> Fitted | None:
        """The fitted detector that is kept under a name, or None."""
        if self.out is None or not (self.out / "detectors" / name / DETECTOR).exists():
            return None
        return load_detector(self.out / "detectors" / name, clf)

    def keep_detector(self, name: str, fitted: Fitted, seconds: float) -> None:
        """Keeps one; what was measured of another under that name is forgotten."""
        if self.out is None:
            return
        for folder in ("points", "scores"):
            for part in (self.out / folder).glob(f"{name}--*"):
                part.unlink()
        fitted.save(self.out / "detectors" / name)
        self.note(seconds)
