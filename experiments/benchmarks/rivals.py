"""The other libraries' attacks as plain functions of points and labels, told the same steps, queries and radius.

Each is imported only when it is asked for; what one lacks is absent from `RIVALS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust.experiments.benchmarks.peers import Plain, Points, batched, quiet


@dataclass(frozen=True)
class Task:
    """What every contestant of a family is told.

    Attributes:
        norm: in which distances are measured; eps: the radius, where success is measured.
        steps: gradients of a search; searches: of a binary search around it; queries: of a black-box attack.
        rounds: iterations of a peer's black-box attack that take about so many queries.
        classes: of the model; bounds: of x; shape: (C, H, W); batch: points at once; seed: where a peer takes one.
    """

    norm: str
    steps: int = 100
    searches: int = 1
    queries: int = 1000
    rounds: int = 10
    eps: float | None = None
    classes: int = 10
    bounds: tuple[float, float] = (0.0, 1.0)
    shape: tuple[int, ...] = (3, 32, 32)
    batch: int = 50
    seed: int = 0


class Counting(Plain):
    """A plain module that counts the points it was asked about."""

    asked = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of x (N, C, H, W) in the box."""
        self.asked += len(x)
        return super().forward(x.float())  # some peers' arrays are float64


Build = Callable[[nn.Module, Task], Points]


def _foolbox(name: str, fields: Callable[[Task], dict[str, Any]]) -> Build:
    """An attack of Foolbox's by its class, untargeted."""

    def build(module: nn.Module, task: Task) -> Points:
        import foolbox as library

        foolbox: Any = library
        device = next(module.parameters()).device
        model = foolbox.PyTorchModel(module, bounds=task.bounds, device=device)
        attack = getattr(foolbox.attacks, name)(**fields(task))

        def run(x: Tensor, y: Tensor) -> Tensor:
            goal = foolbox.criteria.Misclassification(y)
            points: Tensor = attack.run(model, x, goal)
            return points

        return batched(run, task.batch)

    return build


def _torchattacks(name: str, fields: Callable[[Task], dict[str, Any]], targeted: bool = False) -> Build:
    """An attack of torchattacks' by its class; targeted ones aim at the next class."""

    def build(module: nn.Module, task: Task) -> Points:
        import torchattacks

        attack = getattr(torchattacks, name)(module, **fields(task))
        if targeted:
            attack.set_mode_targeted_by_label(quiet=True)

            def run(x: Tensor, y: Tensor) -> Tensor:
                points: Tensor = attack(x, aims(y, task.classes))
                return points

            return batched(run, task.batch)
        return batched(attack, task.batch)

    return build


def _art(name: str, fields: Callable[[Task], dict[str, Any]], targeted: bool = False) -> Build:
    """An attack of the adversarial robustness toolbox's by its class, on its PyTorch estimator."""

    def build(module: nn.Module, task: Task) -> Points:
        from art.attacks import evasion
        from art.estimators.classification import PyTorchClassifier

        device = next(module.parameters()).device
        estimator = PyTorchClassifier(
            model=module,
            loss=nn.CrossEntropyLoss(),
            input_shape=task.shape,
            nb_classes=task.classes,
            clip_values=task.bounds,
            device_type="gpu" if device.type == "cuda" else "cpu",
        )
        attack = getattr(evasion, name)(estimator, verbose=False, **fields(task))

        def run(x: Tensor, y: Tensor) -> Tensor:
            labels = aims(y, task.classes) if targeted else y
            given = nn.functional.one_hot(labels, task.classes).cpu().numpy()
            return torch.from_numpy(attack.generate(x.cpu().numpy(), y=given)).to(x)

        return batched(run, task.batch)

    return build


def aims(y: Tensor, classes: int) -> Tensor:
    """(N,) the next class: what targeted families aim at."""
    return (y + 1) % classes


def _brendel_bethge(name: str) -> Build:
    return _foolbox(name, lambda task: {"steps": task.steps})


# By family, the libraries that have it. The fields are the libraries' own names for the same numbers.
RIVALS: Mapping[str, Mapping[str, Build]] = {
    "deepfool": {
        "foolbox": _foolbox("L2DeepFoolAttack", lambda t: {"steps": t.steps, "candidates": 10}),
        "torchattacks": _torchattacks("DeepFool", lambda t: {"steps": t.steps, "overshoot": 0.02}),
        "art": _art(
            "DeepFool",
            lambda t: {"max_iter": t.steps, "epsilon": 0.02, "nb_grads": 10, "batch_size": t.batch},
        ),
    },
    "deepfool-linf": {
        "foolbox": _foolbox("LinfDeepFoolAttack", lambda t: {"steps": t.steps, "candidates": 10})
    },
    "cw-l2": {
        "foolbox": _foolbox(
            "L2CarliniWagnerAttack",
            lambda t: {
                "steps": t.steps,
                "binary_search_steps": t.searches,
                "stepsize": 0.01,
                "initial_const": 0.01,
            },
        ),
        "torchattacks": _torchattacks("CW", lambda t: {"steps": t.steps * t.searches, "lr": 0.01}),
        "art": _art(
            "CarliniL2Method",
            lambda t: {
                "max_iter": t.steps,
                "binary_search_steps": t.searches,
                "learning_rate": 0.01,
                "initial_const": 0.01,
                "batch_size": t.batch,
            },
        ),
    },
    "ddn": {"foolbox": _foolbox("DDNAttack", lambda t: {"steps": t.steps})},
    "fmn-l2": {"foolbox": _foolbox("L2FMNAttack", lambda t: {"steps": t.steps})},
    "fmn-linf": {"foolbox": _foolbox("LInfFMNAttack", lambda t: {"steps": t.steps})},
    "fmn-l1": {"foolbox": _foolbox("L1FMNAttack", lambda t: {"steps": t.steps})},
    "ead": {
        "foolbox": _foolbox(
            "EADAttack",
            lambda t: {"steps": t.steps, "binary_search_steps": t.searches, "decision_rule": "L1"},
        ),
        "torchattacks": _torchattacks(  # its early stop divides by a tenth of the steps
            "EADL1", lambda t: {"max_iterations": t.steps, "binary_search_steps": t.searches}
        ),
        "art": _art(
            "ElasticNet",
            lambda t: {
                "max_iter": t.steps,
                "binary_search_steps": t.searches,
                "decision_rule": "L1",
                "batch_size": t.batch,
            },
        ),
    },
    "bb-l2": {"foolbox": _brendel_bethge("L2BrendelBethgeAttack")},
    "bb-linf": {"foolbox": _brendel_bethge("LinfinityBrendelBethgeAttack")},
    "bb-l1": {"foolbox": _brendel_bethge("L1BrendelBethgeAttack")},
    "jsma": {
        "torchattacks": _torchattacks("JSMA", lambda t: {"theta": 1.0, "gamma": 0.1}, targeted=True),
        "art": _art(
            "SaliencyMapMethod", lambda t: {"theta": 1.0, "gamma": 0.1, "batch_size": 1}, targeted=True
        ),
    },
    "hopskipjump": {
        "foolbox": _foolbox("HopSkipJumpAttack", lambda t: {"steps": t.rounds}),
        "art": _art(
            "HopSkipJump",
            lambda t: {"max_iter": t.rounds, "init_eval": 100, "max_eval": 10_000, "batch_size": t.batch},
        ),
    },
    "boundary": {
        "foolbox": _foolbox("BoundaryAttack", lambda t: {"steps": t.queries}),
        "art": _art(
            "BoundaryAttack", lambda t: {"max_iter": t.rounds, "targeted": False, "batch_size": t.batch}
        ),
    },
    "square": {
        "torchattacks": _torchattacks(
            "Square", lambda t: {"norm": "Linf", "eps": t.eps, "n_queries": t.queries, "p_init": 0.8}
        ),
        "art": _art(
            "SquareAttack",
            lambda t: {"eps": t.eps, "max_iter": t.queries, "p_init": 0.8, "batch_size": t.batch},
        ),
    },
}


def rival(family: str, library: str, module: nn.Module, task: Task) -> Points:
    """A library's attack of a family, ready to run."""
    with quiet():
        return RIVALS[family][library](module, task)
