"""Everything that needs a GPU, in one run: ``python experiments/benchmarks/gpu.py --out DIR`` from a checkout's root.

Needs torch, triton and numpy, and takes under eight minutes. DIR/gpu.json is written after every part; a part that
fails leaves its reason there and the others their numbers:

1. kernels: the error of every fused operation, in every build, against float64 at odd shapes, and its share of the
   copy's bandwidth with the ratio to eager PyTorch, and which build is the faster one.
2. pgd: PGD-20 on ResNet-20 and, where torchvision is there, ResNet-50: the engine, the graph-captured bare gradient,
   and a plain eager loop.
3. suite: the standard suite on a few points, against itself with the original model and eager operations.

``--device cpu --quick`` is a trial of the script in seconds, on references or Triton's interpreter.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    # Run as a file: the checkout's root in the place of this folder, whose names are nobody's top-level modules.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from robust.attacks.autoattack import AutoAttack
from robust.attacks.base import Result
from robust.classifier import Classifier
from robust.cuda_ops.case import Case
from robust.digest import write_json
from robust.errors import RobustError
from robust.experiments.benchmarks import kernels
from robust.experiments.benchmarks.graphs import EPS, pgd
from robust.experiments.benchmarks.harness import (
    Contestant,
    WrongResult,
    conditions,
    failure,
    fresh,
    timed,
)
from robust.precision import exact_float32
from robust.threat import Linf
from robust.zoo.resnet_cifar import resnet20

RESERVE = 180.0  # seconds that the parts after the fused operations need
Shapes = Sequence[tuple[int, int]]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Run:
    """What the parts share.

    Attributes:
        device: where everything runs; quick: sizes for a trial.
        weights: a ResNet-20's state dict for torch.load or numpy, None for random weights.
        end: the monotonic time at which no further part begins.
    """

    out: Path
    device: torch.device
    quick: bool
    weights: Path | None
    end: float
    record: dict[str, Any] = field(default_factory=dict)

    def late(self, seconds: float = 0.0) -> bool:
        """Whether so many seconds are not left; a trial has time."""
        return not self.quick and time.monotonic() + seconds > self.end

    def part(self, name: str, work: Callable[[Run], dict[str, Any]], needs: float = 0.0) -> None:
        """Does one part that needs so many seconds, whatever happens in it, and writes the record."""
        begun = time.monotonic()
        if self.late(needs):
            found: dict[str, Any] = {"failed": "no time was left; raise --minutes"}
        else:
            try:
                found = work(self)
            except Exception as error:  # noqa: BLE001  one failing part must not lose the others
                place = traceback.extract_tb(error.__traceback__)[-1]
                found = {"failed": f"{failure(error)} ({Path(place.filename).name}:{place.lineno})"}
        self.record[name] = {**found, "part_seconds": time.monotonic() - begun}
        self.save()
        print(f"{name}: {found.get('failed', 'done')} ({time.monotonic() - begun:.1f} s)", flush=True)

    def save(self) -> None:
        """Writes gpu.json."""
        write_json(self.out / "gpu.json", _finite(self.record))


def _finite(value: Any) -> Any:
    """The same with infinities and NaN as text, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# -- fused operations -------------------------------------------------------------------------------------------


def fused(run: Run) -> dict[str, Any]:
    """Part 1: all cases are checked first, then timed; one that fails keeps its reason and the others their numbers."""
    cases, skipped = kernels.find_cases()
    shapes = kernels.ODD[:2] if run.quick else kernels.ODD
    found: dict[str, Any] = {
        name: {"tolerance": case.tolerance, "failures": {}} for name, case in cases.items()
    }
    right: dict[str, list[str]] = {}
    for name, case in cases.items():
        here = kernels.backends_here(case, run.device)
        right[name] = [backend for backend in here if _right(run, case, backend, shapes, found[name])]
        _right(run, case, kernels.REFERENCE, shapes, found[name])
    run.record["kernels"] = {"cases": found}
    run.save()
    for name, case in cases.items():
        _time(run, name, case, right[name], found[name])
        run.save()
        print(f"  {name}: {_line(found[name])}", flush=True)
    wrong = [name for name, own in found.items() if own["failures"]]
    told = {"failed": f"{len(wrong)} of {len(found)} operations: {', '.join(wrong)}"} if wrong else {}
    return {**told, "cases": found, "skipped": skipped}


def _time(run: Run, name: str, case: Case, right: list[str], own: dict[str, Any]) -> None:
    """Times what is right, and says which is the fastest; nothing where no time is left."""
    if run.late(RESERVE):
        own["failures"]["timing"] = "no time was left"
        return
    rounds, aim = (1, 1e-4) if run.quick else (5, 0.01)
    shape = (8, 192) if run.quick else kernels.usual(name, run.device)
    try:
        timed_here = right if run.device.type == "cuda" else []  # an interpreter's time means nothing
        own["timing"] = kernels.time_case(case, run.device, shape, timed_here, rounds, aim=aim)
        own["shape"] = list(shape)
        own["faster"] = max(timed_here, key=own["timing"]["bandwidth"].__getitem__, default="reference")
    except Exception as error:  # noqa: BLE001  one that fails must not lose the others
        own["failures"]["timing"] = failure(error)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def _right(run: Run, case: Case, backend: str, shapes: Shapes, own: dict[str, Any]) -> bool:
    """Whether an implementation is within its tolerance; its error or its failure goes into `own`."""
    if run.late(RESERVE):
        own["failures"][backend] = "no time was left to check it"
        return False
    try:
        wanted = [] if backend == kernels.REFERENCE else [backend]
        own[backend] = kernels.check_case(case, run.device, shapes, wanted)[backend]
        if own[backend]["error"] > own[backend]["limit"]:
            own["failures"][backend] = f"off by {own[backend]['error']:.1e} at {own[backend]['at']}"
    except Exception as error:  # noqa: BLE001  a kernel that does not compile must not hide the others
        own["failures"][backend] = failure(error)
    return backend not in own["failures"]


def _line(own: dict[str, Any]) -> str:
    said = [f"{name} {line}" for name, line in own["failures"].items()]
    if "timing" in own:
        said = [kernels.summary(own["timing"]), f"{own['faster']} is the faster", *said]
    return "; ".join(said)


# -- PGD --------------------------------------------------------------------------------------------------------


def pgd_resnet20(run: Run) -> dict[str, Any]:
    """Part 2 on ResNet-20 at 32 × 32."""
    return _pgd(run, _resnet20(run), (3, 32, 32), 4 if run.quick else 2048)


def pgd_resnet50(run: Run) -> dict[str, Any]:
    """Part 2 on torchvision's ResNet-50 at 224 × 224, with random weights."""
    try:
        from torchvision import models
    except ImportError:
        return {"skipped": "torchvision is not installed, so there is no ResNet-50"}
    size, count = (32, 1) if run.quick else (224, 128)
    name = "resnet18" if run.quick else "resnet50"
    module = models.get_model(name, weights=None).eval()
    clf = Classifier(module, mean=MEAN, std=STD, device=run.device, name=name)
    return _pgd(run, clf, (3, size, size), count)


def _pgd(run: Run, clf: Classifier, shape: tuple[int, int, int], count: int) -> dict[str, Any]:
    x, y = _points(run, clf, shape, count)
    return pgd(clf, x, y, steps=2 if run.quick else 20, repeats=1 if run.quick else 5, say=_say)


# -- the suite --------------------------------------------------------------------------------------------------


def suite(run: Run) -> dict[str, Any]:
    """Part 3: AutoAttack's standard suite with twins and fused operations, and with neither."""
    clf = _resnet20(run)
    # Random weights fall at once, as an undefended model does; so the radius is one that leaves survivors.
    x, y = _points(run, clf, (3, 32, 32), 2 if run.quick else 256)
    attack = AutoAttack(threat=Linf(EPS / 16), version="quick" if run.quick else "standard")
    plain, fast = fresh(clf), fresh(clf)

    def eager(which: AutoAttack) -> Result:
        with kernels.forced("reference"):
            return which.run(plain, x, y, precision="original")

    def check(result: Result) -> dict[str, Any]:
        if bool((~attack.threat.inside(result.x_adv, x, clf.bounds)).any()):
            raise WrongResult("points of ours lie outside the ball")
        return {"broken": int(result.success.sum()), "cost": result.cost.to_dict()}

    warm = AutoAttack(threat=attack.threat, version="quick")
    found: dict[str, Any] = {"n": len(x), "eps": EPS / 16, "contestants": {}}
    calls: dict[str, Callable[[AutoAttack], Result]] = {
        "auto": lambda which: which.run(fast, x, y, precision="auto"),
        "eager": eager,
    }
    for name, call in calls.items():
        call(warm)
        seconds, _, result = timed(Contestant(name, partial(call, attack)), run.device)
        found["contestants"][name] = {"ours": True, "seconds": [seconds], **check(result)}
        _say(f"{name}: {seconds:.1f} s, {int(result.success.sum())} of {len(x)} fell")
    both = found["contestants"]
    return {**found, "ratio": both["eager"]["seconds"][0] / both["auto"]["seconds"][0]}


# -- subjects ---------------------------------------------------------------------------------------------------


def _resnet20(run: Run) -> Classifier:
    """ResNet-20 with the given weights, else random ones."""
    torch.manual_seed(0)
    module = resnet20().eval()
    if run.weights is None:
        print("  random weights: speeds mean what they say, robust accuracies do not", flush=True)
    else:
        module.load_state_dict(read_state(run.weights))
    return Classifier(module, mean=MEAN, std=STD, device=run.device, name="resnet20")


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from an .npz or a file of torch.save.

    Raises:
        RobustError: the file has another form.
    """
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if path.suffix == ".safetensors":
        raise RobustError(
            f"{path} is safetensors, which this script does not read; give .npz or torch.save's"
        )
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _points(run: Run, clf: Classifier, shape: tuple[int, int, int], count: int) -> tuple[Tensor, Tensor]:
    """Random images and what the model says they are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, *shape, generator=generator).to(run.device)
    clf.check(x)
    return x, torch.cat([clf.logits(part).argmax(1) for part in x.split(64)])


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 where every part came to its end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--weights", type=Path, help="a ResNet-20's state dict: .npz, or torch.save's")
    parser.add_argument("--minutes", type=float, default=7.0, help="no part begins after that")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a trial of the script")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: this machine has no GPU; --device cpu --quick tries the script", file=sys.stderr)
        return 2
    if device.type == "cpu":
        torch.set_num_threads(1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    run = Run(chosen.out, device, chosen.quick, chosen.weights, time.monotonic() + 60 * chosen.minutes)
    run.record = {"schema": 1, "benchmark": "gpu", **conditions(device), "quick": run.quick}
    with exact_float32():
        run.part("pgd_resnet20", pgd_resnet20)
        run.part("kernels", fused)
        run.part("pgd_resnet50", pgd_resnet50)
        run.part("suite", suite, 0.6 * RESERVE)
    return int(any("failed" in run.record[part] for part in run.record if isinstance(run.record[part], dict)))


if __name__ == "__main__":
    sys.exit(main())
