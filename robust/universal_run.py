"""A run of a universal attack or a patch: learnt on some images, measured on others and on other models."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robust import __version__
from robust.classifier import Classifier
from robust.cost import Cost
from robust.data import Data
from robust.data.files import EncodedImages
from robust.decide import decide
from robust.digest import write_atomic, write_json
from robust.universal import Apply, Grid, Outcome, outcome, success_grid

REPORT = "report.html"
SUMMARY = "summary.json"
Progress = Callable[[float, str], None]


@dataclass
class UniversalRun:
    """What a run found.

    Attributes:
        summary: all numbers and their conditions, JSON-ready.
        change: what was learnt: an object of the attacks' room with `apply`, `save` and, of a patch, `save_png`.
        outcome: what it did to the unseen images. grid: a patch's success over scale and angle.
        photos: (name, photograph, photograph with the patch) for each one given.
    """

    summary: dict[str, Any]
    change: Any
    model: Classifier
    unseen: Data
    outcome: Outcome
    grid: Grid | None = None
    photos: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    @property
    def is_patch(self) -> bool:
        """Whether it is a patch, and not a perturbation of the whole image."""
        return hasattr(self.change, "save_png")

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """Images as they were measured."""
        return applied(self.change, self.summary["seed"])(x, index)

    def show_photos(self, paths: Sequence[Path]) -> None:
        """Places the patch in photographs, and asks the model about them at its own resolution."""
        low, high = self.model.bounds
        told = []
        for path in paths:
            photo = low + (high - low) * _channels(
                EncodedImages([str(path)]).read([0])[0], self.unseen.shape[0]
            )
            placed = self.change.place(photo, at=(0.5, 0.7))
            self.photos.append((path.name, photo, placed))
            small = torch.stack([_resized(image, self.unseen.shape) for image in (photo, placed)])
            labels = decide(self.model, small.clamp(low, high), torch.zeros(2, dtype=torch.long)).prediction
            told.append({"photo": path.name, "clean": int(labels[0]), "with_patch": int(labels[1])})
        self.summary["photos"] = told

    def write(self, out: Path, *, width_mm: float = 100.0, dpi: float = 300.0) -> None:
        """Writes the folder: what was learnt, its picture, the numbers, and the report that shows them."""
        from robust.report_figures import magnified
        from robust.report_universal import write_universal_report

        out.mkdir(parents=True, exist_ok=True)
        low, high = self.model.bounds
        if self.is_patch:
            self.change.save(out / "patch.safetensors")
            if self.change.texture.shape[0] in (1, 3):
                dots = self.change.save_png(out / "patch.png", width_mm=width_mm, dpi=dpi)
                self.summary["print"] = {
                    "width_mm": width_mm,
                    "dpi": dpi,
                    "height": dots[0],
                    "width": dots[1],
                }
        else:
            self.change.save(out / "perturbation.safetensors")
            delta = self.change.delta
            write_png(out / "perturbation.png", magnified(torch.zeros_like(delta), delta, high - low)[0])
        for name, _, placed in self.photos:
            (out / "photos").mkdir(exist_ok=True)
            write_png(out / "photos" / f"{Path(name).stem}.png", (placed - low) / (high - low))
        self.summary["out"] = str(out)
        write_json(out / SUMMARY, self.summary)
        write_universal_report(self, out / REPORT)


def learn_and_measure(
    attack: Any,
    model: Classifier,
    learn: Data,
    unseen: Data,
    *,
    name: str,
    target: int | None = None,
    others: Mapping[str, Classifier] | None = None,
    seed: int = 0,
    precision: str = "auto",
    grid: bool = True,
    progress: Progress = lambda fraction, text: None,
) -> UniversalRun:
    """Learns one change on `learn` and measures it on `unseen`: images that are in neither other.

    Success counts the images that the model classifies correctly and that are not of the target class. Beside it stand
    a control (noise of the same size), a patch under light and print noise and over scale and angle, and other models.

    Args:
        attack: a universal attack or a patch, of the attacks' room.
        target: the class to reach; None for any wrong one, or what a targeted attack chooses for itself.
        others: models by name on which it is measured too.
        grid: whether a patch is measured over scale and angle, the dearest part.
        progress: told the fraction done and what is going on.
    """
    started, before = time.perf_counter(), model.cost + Cost()
    x, y = learn.tensors()
    change = attack.fit(
        model, x, y, targets=target, seed=seed, precision=precision,
        progress=lambda done: progress(0.6 * done, f"learning on {len(x)} images"),
    )  # fmt: skip
    target = change.target if target is None else target
    measured = outcome(
        model, unseen, applied(change, seed), target=target, seed=seed,
        progress=lambda done: progress(0.6 + 0.1 * done, f"{len(unseen)} unseen images"),
    )  # fmt: skip
    run = UniversalRun({}, change, model, unseen, measured)
    extra: dict[str, Any] = {"control": _again(run, applied(change.control(seed), seed), target, seed)}
    if run.is_patch:
        if change.brightness or change.noise:
            extra["printed"] = _again(run, applied(change, seed, printing=True), target, seed)
        if grid:
            run.grid = _grid(run, seed, progress)
            extra["grid"] = asdict(run.grid)
    extra["transfer"] = [
        {"model": other, **elsewhere(clf, unseen, change, target, seed)}
        for other, clf in (others or {}).items()
    ]
    cost = model.cost - before
    cost.seconds = time.perf_counter() - started
    run.summary = _summary(name, attack, run, learn, target, seed) | extra
    run.summary |= {"seconds": round(cost.seconds, 3), "cost": cost.to_dict()}
    run.summary["warnings"] = [*model.warnings, *doubts(run.summary, model.classes)]
    return run


def applied(change: Any, seed: int, printing: bool = False) -> Apply:
    """How a change is put on images given their index; a patch at places keyed by it."""
    if hasattr(change, "save_png"):
        return lambda x, index: change.apply(x, seed=seed, index=index, printing=printing)
    return lambda x, index: change.apply(x)


def _again(run: UniversalRun, apply: Apply, target: int | None, seed: int) -> dict[str, Any]:
    """Another change on the same images."""
    found = outcome(run.model, run.unseen, apply, target=target, seed=seed, clean=run.outcome.clean)
    return found.summary()


def elsewhere(clf: Classifier, unseen: Data, change: Any, target: int | None, seed: int) -> dict[str, Any]:
    """A change, and noise of its size, on another model, which counts the images that it classifies correctly."""
    found = outcome(clf, unseen, applied(change, seed), target=target, seed=seed)
    noise = applied(change.control(seed), seed)
    control = outcome(clf, unseen, noise, target=target, seed=seed, clean=found.clean)
    return {**found.summary(), "control": control.summary(), "digest": clf.digest()}


def _grid(run: UniversalRun, seed: int, progress: Progress) -> Grid:
    """A patch's success over scale and angle."""

    def at(x: Tensor, index: Tensor, angle: float, scale: float) -> Tensor:
        return run.change.apply(x, seed=seed, index=index, angle=angle, scale=scale)  # type: ignore[no-any-return]

    return success_grid(
        run.model, run.unseen, at, run.change.axes(), run.outcome, seed=seed,
        progress=lambda done: progress(0.7 + 0.3 * done, "scales and angles"),
    )  # fmt: skip


def _summary(
    name: str, attack: Any, run: UniversalRun, learn: Data, target: int | None, seed: int
) -> dict[str, Any]:
    """The numbers of the main measurement and the conditions of all."""
    parameters = {item.name: getattr(attack, item.name) for item in fields(attack) if item.name != "threat"}
    change, device = run.change, run.model.device
    found = {
        "attack": name,
        "parameters": parameters,
        "model": run.model.name,
        "model_digest": run.model.digest(),
        "data": run.unseen.name,
        "train": len(learn),
        "target": target,
        "target_name": None if target is None else class_name(run.unseen.classes, target),
        **run.outcome.summary(),
        "threat": attack.threat.describe(),
        "suite": name,
        "seed": seed,
        "learning": change.cost,
        "history": change.history,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"robust": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    if run.is_patch:
        found |= {"area": change.area, "shape": [round(side, 3) for side in change.size]}
        if change.towards is not None:
            found["towards"] = class_name(run.unseen.classes, change.towards)
    return found


def doubts(summary: Mapping[str, Any], classes: int) -> list[str]:
    """Reasons not to take a success rate at its word."""
    found = []
    attempted, rate = summary["attempted"], summary["success_rate"]
    if rate is None:
        return ["no unseen image counts: the model classifies none correctly, or all are of the target class"]
    if attempted < 300:
        low, high = summary["interval"]
        found.append(
            f"only {attempted} unseen images count: the rate may be anything from {low:.1%} to {high:.1%}"
        )
    if summary["clean_accuracy"] < 1.5 / max(classes, 2):
        found.append("the model is hardly better than guessing on clean images; is the normalisation right?")
    control = summary["control"]["success_rate"]
    if control and control > 0.5 * rate:
        found.append(f"noise of the same size fools {control:.1%}: much of the success needs no learning")
    history = summary["history"]
    if len(history) > 1 and history[-1]["loss"] <= history[0]["loss"]:
        found.append("the loss did not rise while it was learnt; try more steps or another step_size")
    return found


def class_name(classes: Sequence[str], label: int) -> str:
    """A class's name, or its number where it has none."""
    return classes[label] if 0 <= label < len(classes) else str(label)


def write_png(path: Path, image: Tensor) -> None:
    """An image (C, H, W) in [0, 1] as it is; other than one or three channels as their mean."""
    import io

    from PIL import Image

    image = image if image.shape[0] in (1, 3) else image.mean(0, keepdim=True)
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    stream = io.BytesIO()
    Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels).save(stream, format="PNG")
    write_atomic(path, stream.getvalue())


def _channels(image: Tensor, wanted: int) -> Tensor:
    """A photograph in as many channels as the patch has."""
    return image if len(image) == wanted else image.mean(0, keepdim=True).expand(wanted, -1, -1)


def _resized(image: Tensor, shape: Sequence[int]) -> Tensor:
    """A photograph at the model's resolution, filtered; its sides' ratio becomes the model's."""
    return F.interpolate(image[None], tuple(shape[1:]), mode="bilinear", antialias=True, align_corners=False)[
        0
    ]
