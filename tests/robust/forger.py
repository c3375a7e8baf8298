"""A forger of run folders: whatever he changes, his digests fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from robust import Verdict
from robust.digest import data_digest, file_digest, sample_digest

JOURNAL, EXAMPLES, MANIFEST = "samples.jsonl", "adversarial.safetensors", "manifest.json"


class Forger:
    """Changes a folder and makes its digests fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[dict[str, Any]] = [
            json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()
        ]
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        self.tensors = load_file(folder / EXAMPLES)

    def clean(self, i: int) -> dict[str, Any]:
        """The clean record of sample i."""
        return next(line for line in self.lines if line.get("i") == i and "broken_by" not in line)

    @property
    def broken(self) -> dict[str, Any]:
        """The first record of a broken sample."""
        return next(line for line in self.lines if "broken_by" in line)

    @property
    def standing(self) -> int:
        """A sample that no attack broke."""
        fallen = {line["i"] for line in self.lines if "broken_by" in line}
        return next(line["i"] for line in self.lines if line.get("correct") and line["i"] not in fallen)

    @property
    def commits(self) -> list[dict[str, Any]]:
        """The groups' last lines."""
        return [line["commit"] for line in self.lines if "commit" in line]

    def recount(self) -> None:
        """Claims that fit the samples."""
        self.write()
        self.manifest["results"] = Verdict.load(self.folder).results()

    def write(self) -> None:
        """Everything back into the folder, with digests that fit."""
        (self.folder / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        (self.folder / MANIFEST).write_text(json.dumps(self.manifest))
        save_file(self.tensors, self.folder / EXAMPLES)
        names = json.loads((self.folder / "digests.json").read_text())
        digests = {name: file_digest(self.folder / name) for name in names}
        (self.folder / "digests.json").write_text(json.dumps(digests))


def _relabel_with_digest(f: Forger, x: Tensor) -> None:
    record = f.clean(9)
    record["y"] = (record["y"] + 1) % 3
    record["x"] = sample_digest(x[9], record["y"])
    f.manifest["data"]["digest"] = data_digest([line["x"] for line in f.lines if "x" in line])


def _wider(f: Forger) -> None:
    f.manifest["threat"]["eps"] = f.manifest["plan"]["eps"] = [2 * eps for eps in f.manifest["threat"]["eps"]]
    f.manifest["results"]["curve"] = [[2 * eps, height] for eps, height in f.manifest["results"]["curve"]]
    for stage in f.manifest["stages"]:
        stage["eps"] *= 2


def _claim(f: Forger) -> None:
    f.manifest["results"]["robust_accuracy"] = f.manifest["results"]["clean_accuracy"]


def _claim_everywhere(f: Forger) -> None:
    _claim(f)
    f.manifest["results"]["robust"] = f.manifest["results"]["correct"]
    f.manifest["results"]["curve"] = [
        [eps, f.manifest["results"]["clean_accuracy"]] for eps in f.manifest["threat"]["eps"]
    ]


def _hide_a_break(f: Forger) -> None:
    f.lines.remove(f.broken)
    f.recount()


def _invent_a_right_answer(f: Forger) -> None:
    record = f.clean(0)
    record.update(correct=True, prediction=record["y"], marginal=True)
    f.recount()


def _call_it(f: Forger, i: int, correct: bool) -> None:
    f.clean(i).update(correct=correct, marginal=True)
    f.recount()


def _invent_a_break(f: Forger, x: Tensor) -> None:
    commit = next(commit for commit in f.commits if commit["attack"] == "pgd")
    place = next(k for k, line in enumerate(f.lines) if line.get("commit") is commit)
    i = f.standing
    f.lines.insert(place, {**f.broken, "i": i, "eps": commit["eps"], "broken_by": "pgd", "marginal": True})
    f.recount()


def _swap_examples(f: Forger) -> None:
    f.tensors["adversarial"] = f.tensors["adversarial"].flip(0).contiguous()


def _clean_example(f: Forger, x: Tensor) -> None:
    """An example that is no longer one, at its own new distance, called marginal."""
    record = f.broken
    row = f.tensors["index"].tolist().index(record["i"])
    f.tensors["adversarial"][row] = x[record["i"]]
    record.update(distance=0.0, marginal=True)
    f.recount()


def _far_example(f: Forger, x: Tensor) -> None:
    record = f.broken
    row = f.tensors["index"].tolist().index(record["i"])
    point = f.tensors["adversarial"][row]
    point[0, 0, 0] = x[record["i"], 0, 0, 0] + 2 * record["eps"]
    record["distance"] = float((point.double() - x[record["i"]].double()).abs().max())


def _set(*path: Any, value: Any) -> Callable[[Forger], None]:
    def change(f: Forger) -> None:
        place = f.manifest
        for name in path[:-1]:
            place = place[name]
        assert place[path[-1]] != value
        place[path[-1]] = value

    return change


FORGERIES: dict[str, tuple[Callable[..., None], str]] = {
    "a label": (lambda f: f.clean(9).update(y=(f.clean(9)["y"] + 1) % 3), "sample 9 has the label"),
    "a label and its digest": (_relabel_with_digest, "sample 9 has the label"),
    "a clean prediction": (lambda f: f.clean(0).update(prediction=3 - f.clean(0)["y"] - f.clean(0)["prediction"]),
                           "clean sample 0 is predicted"),
    "a clean confidence": (lambda f: f.clean(5).update(confidence=0.999), "clean sample 5 has the confidence"),
    "an adversarial prediction": (lambda f: f.broken.update(prediction=f.clean(f.broken["i"])["y"]), "is predicted"),
    "a pixel": (lambda f: f.tensors["adversarial"][0, 0, 0].add_(1e-3), "not at the distance|outside its threat"),
    "examples in another order": (_swap_examples, "outside its threat"),
    "a clean point as example": (_clean_example, "not what the verdict says"),
    "an example too far away": (_far_example, "outside its threat"),
    "an example at another eps": (lambda f: f.broken.update(eps=0.5), "another attack or eps"),
    "a distance": (lambda f: f.broken.update(distance=1e-4), "not at the distance"),
    "another attack's name": (lambda f: f.broken.update(broken_by="square"), "another attack or eps"),
    "a claimed accuracy": (_claim, "claims robust_accuracy"),
    "a claimed accuracy everywhere": (_claim_everywhere, "claims robust_accuracy"),
    "a count": (_set("results", "robust", value=16), "claims robust=16"),
    "a curve": (_set("results", "curve", 0, 1, value=1.0), "claims curve"),
    "an eps": (_set("threat", "eps", 1, value=0.5), "eps"),
    "a wider threat everywhere": (_wider, "eps"),
    "a norm": (_set("threat", "norm", value="l2"), "outside its threat|not at the distance"),
    "a norm that is none": (_set("threat", "norm", value="linx"), "linx"),
    "a suite": (_set("suite", "stages", value=[{"attack": "apgd-ce"}]), "suite"),
    "a cost": (_set("cost", "forwards", value=10**9), "stages or cost"),
    "a stage": (_set("stages", 1, "broken", value=0), "stages or cost"),
    "a missing part": (lambda f: f.manifest.pop("results"), "results"),
    "a hidden break": (_hide_a_break, "does not hold what its last line says"),
    "an invented right answer": (_invent_a_right_answer, "clean sample 0 is predicted"),
    "a wrong answer called right": (lambda f: _call_it(f, 0, True), "clean sample 0 is wrong"),
    "a right answer called wrong": (lambda f: _call_it(f, f.standing, False), r"clean sample \d+ is right"),
    "an invented break": (_invent_a_break, "does not hold what its last line says"),
    "a doubled example": (lambda f: f.tensors.update({k: torch.cat([v, v[:1]]) for k, v in f.tensors.items()}),
                          "examples are not those"),
    "an example of nobody": (lambda f: f.tensors["index"].add_(100), "examples are not those"),
    "another data digest": (_set("data", "digest", value="0" * 64), "manifest's data"),
    "another model digest": (_set("model", "digest", value="0" * 64), "the model is not the one"),
}  # fmt: skip
