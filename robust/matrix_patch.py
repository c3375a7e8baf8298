"""The matrix's column `patch`: a universal patch learnt on a row itself, through its defences, and kept as evidence.

A sample stands if it is classified correctly without the patch and with it; one that only the patch sets right does
not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from robust.classifier import Classifier
from robust.data import Data
from robust.decide import decide
from robust.digest import data_digest, file_digest, read_json, sample_digest, write_json
from robust.errors import ConfigError, RunError, VerificationError
from robust.registry import room
from robust.universal import Outcome, outcome
from robust.universal_run import REPORT, SUMMARY, applied, learn_and_measure

PATCH_FILE, SAMPLES, DIGESTS = "patch.safetensors", "samples.json", "digests.json"
_EVIDENCE = (PATCH_FILE, SUMMARY, SAMPLES, REPORT)
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class PatchSettings:
    """How the patches of a matrix are learnt.

    Attributes:
        share: of the image's area, in (0, 1].
        steps: of learning; None for the attack's own.
    """

    share: float = 0.1
    steps: int | None = None

    def attack(self, shape: tuple[int, int, int]) -> Any:
        """The untargeted patch for images of this shape."""
        chosen = {} if self.steps is None else {"steps": self.steps}
        return room("attacks").load("patch").sized(self.share, *shape[1:], **chosen)

    def describe(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)

    def check(self, model: Classifier, data: Data, learn: Data | None) -> None:
        """Refuses in one line what no patch could be learnt from."""
        if learn is None or not len(learn):
            raise ConfigError(
                "a patch is learnt on samples that it is not measured on; give some, by fewer --n"
            )
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"{self.steps} steps teach nothing; give at least 1")
        attack, (_, height, width) = self.attack(data.shape), data.shape
        if self.share * height * width < 1:
            raise ConfigError(
                f"a patch of {self.share:g} of {height} × {width} pixels has none; give a larger share"
            )
        attack.check_steps()
        attack.validate(model, *learn.batch(range(min(4, len(learn)))), None)


def unseen_rows(data: Data, measured: int) -> list[int]:
    """The rows of `data` after the first `measured` that are none of these again: what a patch may be learnt from."""
    taken = {sample_digest(*data[row]) for row in range(measured)}
    return [row for row in range(measured, len(data)) if sample_digest(*data[row]) not in taken]


def measure_patch(
    model: Classifier,
    data: Data,
    learn: Data | None,
    settings: PatchSettings,
    place: Path,
    *,
    seed: int,
    precision: str,
    progress: Progress,
) -> tuple[dict[str, Any], Outcome]:
    """Learns a patch on `learn` and measures it on `data`; what `place` holds already finished is read back.

    The gradient is the one that the model's defences declare (BPDA), and every step takes new draws of a randomised
    one, as it does of places: Adam ascends the expectation over both (EOT). Outcomes are majorities over keyed draws.

    Returns:
        The summary, and what became of every sample.

    Raises:
        RunError: `place` holds another run.
    """
    assert learn is not None
    plan = _plan(model, data, learn, settings, seed)
    if (place / DIGESTS).exists():
        stored = read_json(place / SAMPLES)
        for key, value in plan.items():
            if stored["plan"].get(key) != value:
                raise RunError(
                    f"the patch in {place} is of another run: {key} differs; choose another folder"
                )
        return read_json(place / SUMMARY), _outcome(stored)
    run = learn_and_measure(
        settings.attack(data.shape), model, learn, data, name="patch", seed=seed, grid=False,
        precision="original" if model.randomised else precision, progress=progress,
    )  # fmt: skip
    run.write(place)
    digests = [sample_digest(*learn[row]) for row in range(len(learn))]
    found = {name: getattr(run.outcome, name).tolist() for name in ("y", "clean", "changed")}
    write_json(place / SAMPLES, {"plan": plan, **found, "learnt": digests})
    write_json(place / DIGESTS, {name: file_digest(place / name) for name in _EVIDENCE})
    return run.summary, run.outcome


def _plan(model: Classifier, data: Data, learn: Data, settings: PatchSettings, seed: int) -> dict[str, Any]:
    """What a resumed cell must have in common with the stored one."""
    digests = [data_digest([sample_digest(*part[i]) for i in range(len(part))]) for part in (data, learn)]
    return {
        "model": model.digest(),
        "data": digests[0],
        "learn": digests[1],
        "seed": seed,
        **settings.describe(),
    }


def _outcome(stored: dict[str, Any]) -> Outcome:
    y, clean, changed = (torch.tensor(stored[name], dtype=torch.long) for name in ("y", "clean", "changed"))
    return Outcome(y, clean, changed)


def verify_patch(place: Path, model: Classifier, data: Data, settings: PatchSettings) -> dict[str, Any]:
    """Puts the stored patch on the samples again and holds the model's answers against the stored ones.

    Returns:
        How many samples it fools, as `examples`, and `marginal_differences`, rows that differ within float noise.

    Raises:
        VerificationError: files, data, model, size, or an answer are not what is stored, or it was learnt on a sample
            that it is measured on. RunError: the folder is missing or unfinished.
    """
    if not (place / DIGESTS).exists():
        raise RunError(f"{place} is not a finished patch; the matrix goes on with --resume")
    for name, digest in read_json(place / DIGESTS).items():
        if not (place / name).is_file() or file_digest(place / name) != digest:
            raise VerificationError(f"{place / name} was altered: its sha256 differs from {DIGESTS}")
    stored, summary = read_json(place / SAMPLES), read_json(place / SUMMARY)
    digests = [sample_digest(*data[row]) for row in range(len(data))]
    if data_digest(digests) != stored["plan"]["data"] or model.digest() != stored["plan"]["model"]:
        raise VerificationError("the model or the data are not those of the stored patch")
    if {*digests} & {*stored["learnt"]}:
        raise VerificationError("the patch was learnt on samples that it is measured on")
    patch = room("attacks.patch").load("trained").load(place / PATCH_FILE)
    if patch.area > settings.share + 1e-6:
        raise VerificationError(
            f"the patch covers {patch.area:.3f} of the image, more than {settings.share:g}"
        )
    seed, before = stored["plan"]["seed"], _outcome(stored)
    now = outcome(model, data, applied(patch, seed), seed=seed)
    told = {name: summary[name] for name in ("fooled", "attempted", "n")}
    if told != {name: before.summary()[name] for name in told}:
        raise VerificationError(f"{SUMMARY} does not say what {SAMPLES} does")
    differing = ((now.clean != before.clean) | (now.changed != before.changed)).nonzero()[:, 0].tolist()
    for row in differing:
        x, y = data.batch([row])
        index = torch.tensor([row])
        points = {"clean": x, "changed": applied(patch, seed)(x, index)}
        for name, point in points.items():
            same = getattr(now, name)[row] == getattr(before, name)[row]
            if not same and bool(decide(model, point, y, index=index, seed=seed).firm[0]):
                raise VerificationError(f"sample {row} ({name}) is not answered as {SAMPLES} says")
    return {"examples": int(before.fooled.sum()), "marginal_differences": differing}
