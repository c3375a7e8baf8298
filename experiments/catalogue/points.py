"""Repeats the papers' points on a real model and records what was measured, whatever its sign.

    python -m robust.experiments.catalogue.points OUT.json MODEL DATA --weights FILE --mean … --std … [--only NAME …]

A point that OUT.json already holds is kept, unless it is named.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust.attacks import get
from robust.attacks.base import Result
from robust.classifier import Classifier
from robust.data import load_data
from robust.digest import write_json
from robust.experiments.benchmarks.harness import conditions
from robust.experiments.verdicts.reference import add_subject, subject_model
from robust.threat import L0, L1, L2, Linf, Threat


@dataclass(frozen=True)
class Subject:
    """A model and the samples that it classifies correctly."""

    clf: Classifier
    x: Tensor
    y: Tensor

    def run(self, name: str, threat: Threat, few: int | None = None, **fields: Any) -> Result:
        """An attack on all samples, or the first few."""
        count = len(self.x) if few is None else min(few, len(self.x))
        attack = get(name)(threat=threat, **fields)
        result: Result = attack.run(self.clf, self.x[:count], self.y[:count])
        return result


def median(values: Tensor, success: Tensor) -> float:
    """The median distance, a failure counting as infinite."""
    return float(torch.where(success, values, torch.inf).median())


def sparser(subject: Subject) -> dict[str, Any]:
    """EAD is sparser in l1 than C&W (Chen et al. 2018, arXiv:1709.04114)."""
    ead = subject.run("ead", L1(), steps=100, search_steps=5)
    cw = subject.run("cw-l2", L2(), steps=100, search_steps=5)
    ours, theirs = (median(L1().distance(result.x_adv, subject.x), result.success) for result in (ead, cw))
    return {"ead_l1": ours, "cw_l1": theirs, "holds": ours < theirs}


def cheaper(subject: Subject) -> dict[str, Any]:
    """DDN is within 5 % of C&W's median l2 at a tenth of the gradients (Rony et al. 2019, arXiv:1811.09600)."""
    ddn = subject.run("ddn", L2(), steps=100)
    cw = subject.run("cw-l2", L2(), steps=100, search_steps=10)
    ours, theirs = (median(result.distance, result.success) for result in (ddn, cw))
    gradients = [result.cost.backwards / len(subject.x) for result in (ddn, cw)]
    holds = ours <= 1.05 * theirs and gradients[0] <= gradients[1] / 5
    return {
        "ddn": ours,
        "cw": theirs,
        "ddn_gradients": gradients[0],
        "cw_gradients": gradients[1],
        "holds": holds,
    }


def no_larger(subject: Subject) -> dict[str, Any]:
    """FMN is not above PGD's best eps by binary search, 100 gradients each (Pintor et al. 2021, arXiv:2102.12827).

    As in the paper, FMN's first step is chosen per model; PGD's ten steps are a quarter of each radius.
    """
    found: dict[str, Any] = {"holds": True}
    for threat, most in ((Linf, 16 / 255), (L2, 2.0)):
        name, ours = threat.norm, []
        for size in (1.0, 0.3):
            fmn = subject.run("fmn", threat(), steps=100, step_size=size)
            ours.append(median(fmn.distance, fmn.success))
            found[f"fmn_{name}_from_{size:g}"] = ours[-1]
        found[f"pgd_{name}"] = _searched(subject, threat, most)
        found["holds"] &= min(ours) <= found[f"pgd_{name}"]
    return found


def _searched(subject: Subject, threat: type[Threat], most: float) -> float:
    """The median over samples of the smallest radius at which PGD with 10 steps succeeds, by ten bisections."""
    low, high = torch.zeros(len(subject.x)), torch.full((len(subject.x),), most)
    success = subject.run("pgd", threat(high), steps=10, until="broken").success
    for _ in range(10):
        middle = (low + high) / 2
        hit = subject.run("pgd", threat(middle), steps=10, until="broken").success
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    return median(high.double(), success)


def frugal(subject: Subject) -> dict[str, Any]:
    """RayS reaches a linf radius with fewer queries than Sign-OPT (Chen & Gu 2020, arXiv:2006.06792)."""
    rays = subject.run("rays", Linf(), few=50, queries=2000)
    sign = subject.run("sign-opt", Linf(), few=50, queries=2000)
    reached: dict[str, Any] = {}
    radius = 8 / 255
    for name in ("rays", "sign-opt"):
        result = subject.run(name, Linf(radius), few=50, queries=5000, until="broken")
        assert result.queries is not None
        reached[name] = float(torch.where(result.success, result.queries.double(), torch.inf).median())
    ours, theirs = (median(result.distance, result.success) for result in (rays, sign))
    return {
        "rays_queries": reached["rays"],
        "sign_opt_queries": reached["sign-opt"],
        "rays_linf_2000": ours,
        "sign_opt_linf_2000": theirs,
        "holds": reached["rays"] < reached["sign-opt"],
    }


def fewer_pixels(subject: Subject) -> dict[str, Any]:
    """Sigma-zero changes fewer pixels than JSMA (Cinà et al. 2024, arXiv:2402.01879)."""
    sigma = subject.run("sigma-zero", L0())
    jsma = subject.run("jsma", L0())
    ours, theirs = (median(result.distance, result.success) for result in (sigma, jsma))
    return {"sigma_zero": ours, "jsma": theirs, "holds": ours < theirs}


def nearer(subject: Subject) -> dict[str, Any]:
    """SuperDeepFool finds smaller perturbations than DeepFool (Abdollahpoor et al. 2023, arXiv:2303.12481)."""
    better, plain = subject.run("superdeepfool", L2()), subject.run("deepfool", L2())
    ours, theirs = (median(result.distance, result.success) for result in (better, plain))
    return {"superdeepfool": ours, "deepfool": theirs, "holds": ours < theirs}


def at_least_as_near(subject: Subject) -> dict[str, Any]:
    """BB and ALMA end at or below DDN's l2 at as many steps (arXiv:1907.01003, arXiv:2011.11857)."""
    found = {
        name: median(result.distance, result.success)
        for name in ("bb", "alma", "ddn")
        for result in [subject.run(name, L2(), steps=300)]
    }
    return {**found, "holds": max(found["bb"], found["alma"]) <= 1.02 * found["ddn"]}


def priors(subject: Subject) -> dict[str, Any]:
    """Bandits, SignHunter and Square need fewer queries than NES (arXiv:1807.07978, 1902.06894, 1912.00049)."""
    found: dict[str, Any] = {}
    for name in ("nes", "bandits", "signhunter", "square"):
        result = subject.run(name, Linf(4 / 255), few=50, queries=1000, until="broken")
        assert result.queries is not None
        found[f"{name}_success"] = float(result.success.double().mean())
        found[f"{name}_queries"] = float(
            torch.where(result.success, result.queries.double(), torch.inf).median()
        )
    others = [found[f"{name}_success"] for name in ("bandits", "signhunter", "square")]
    return {**found, "holds": min(others) >= found["nes_success"]}


POINTS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "ead-sparser-than-cw": sparser,
    "ddn-near-cw": cheaper,
    "fmn-against-pgd": no_larger,
    "rays-against-sign-opt": frugal,
    "sigma-zero-against-jsma": fewer_pixels,
    "superdeepfool-against-deepfool": nearer,
    "bb-and-alma-against-ddn": at_least_as_near,
    "priors-against-nes": priors,
}


def subject_of(arguments: argparse.Namespace, n: int) -> Subject:
    """The model, and those of the first n samples that it classifies correctly."""
    clf = subject_model(arguments)
    x, y = load_data(arguments.data, n=n, root=arguments.data_root).tensors()
    right = torch.cat([clf.logits(part) for part in x.split(50)]).argmax(1) == y
    return Subject(clf, x[right], y[right])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    add_subject(parser)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=list(POINTS))
    arguments = parser.parse_args()
    record: dict[str, Any] = (
        json.loads(arguments.out.read_text()) if arguments.out.exists() else {"points": {}}
    )
    subject = subject_of(arguments, arguments.n)
    about = {
        "model": subject.clf.name,
        "digest": subject.clf.digest(),
        "n": arguments.n,
        "correct": len(subject.x),
    }
    record["subject"] = about
    for name, measure in POINTS.items():
        if name in record["points"] and name not in (arguments.only or ()):
            continue
        if arguments.only and name not in arguments.only:
            continue
        begun = time.perf_counter()
        facts = measure(subject)
        took = round(time.perf_counter() - begun, 1)
        claim = (measure.__doc__ or "").strip().partition("\n")[0]
        facts = {key: None if value == math.inf else value for key, value in facts.items()}
        record["points"][name] = {"claim": claim, **facts, "seconds": took, **conditions(subject.clf.device)}
        record["date"] = dt.datetime.now(dt.UTC).date().isoformat()
        write_json(arguments.out, record)
        print(f"{name}: {facts} in {took} s", flush=True)


if __name__ == "__main__":
    main()
