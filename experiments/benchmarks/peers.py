"""The other libraries: their PGD as plain functions, made alike, and which of them are here.

They are the extra ``bench``, for an environment of its own; each is imported only when it is asked for.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust.classifier import Classifier, misclassified
from robust.experiments.verdicts.reference import build
from robust.threat import Linf

Points = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Descent:
    """What a PGD is told.

    Attributes:
        eps, step_size: in the unit of x, linf; steps: gradients from a random start.
        batch: points at once; classes: of the model; bounds: of x.
    """

    eps: float
    step_size: float
    steps: int
    batch: int
    classes: int
    bounds: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Peer:
    """A library: the package to import, the name it is installed by, and its PGD as a function of x and y."""

    package: str
    distribution: str
    pgd: Callable[[nn.Module, Descent, tuple[int, ...]], Points]


class Plain(nn.Module):
    """A classifier as the plain module that peers expect: normalisation inside, eval mode, weights frozen.

    Args:
        clf: stays as it is; its module is copied.
    """

    def __init__(self, clf: Classifier) -> None:
        super().__init__()
        self.inner = copy.deepcopy(clf.module).eval().requires_grad_(False)
        self.mean, self.std = clf.mean.clone(), clf.std.clone()
        # torchattacks reads the device off the first parameter, which a model may lack
        self.anchor = nn.Parameter(torch.zeros(1, device=clf.device), requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of x (N, C, H, W) in the box."""
        logits: Tensor = self.inner((x - self.mean) / self.std)
        return logits


def batched(attack: Points, batch: int) -> Points:
    """The same attack on `batch` points at a time."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        parts = zip(x.split(batch), y.split(batch), strict=True)
        return torch.cat([attack(*part).detach() for part in parts])

    return run


def torchattacks_pgd(module: nn.Module, descent: Descent, shape: tuple[int, ...]) -> Points:
    """torchattacks' PGD."""
    import torchattacks

    attack = torchattacks.PGD(
        module, eps=descent.eps, alpha=descent.step_size, steps=descent.steps, random_start=True
    )
    return batched(attack, descent.batch)


def foolbox_pgd(module: nn.Module, descent: Descent, shape: tuple[int, ...]) -> Points:
    """Foolbox's LinfPGD; `run` leaves out the check of the result, which the others do not make either."""
    import foolbox as library

    foolbox: Any = library
    device = next(module.parameters()).device
    model = foolbox.PyTorchModel(module, bounds=descent.bounds, device=device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=descent.step_size, steps=descent.steps, random_start=True)

    def run(x: Tensor, y: Tensor) -> Tensor:
        points: Tensor = attack.run(model, x, foolbox.criteria.Misclassification(y), epsilon=descent.eps)
        return points

    return batched(run, descent.batch)


def art_pgd(module: nn.Module, descent: Descent, shape: tuple[int, ...]) -> Points:
    """The adversarial robustness toolbox's PGD (its PyTorch form), which takes and gives arrays."""
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    device = next(module.parameters()).device
    estimator = PyTorchClassifier(
        model=module,
        loss=nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=descent.classes,
        clip_values=descent.bounds,
        device_type="gpu" if device.type == "cuda" else "cpu",
    )
    attack = ProjectedGradientDescent(
        estimator,
        eps=descent.eps,
        eps_step=descent.step_size,
        max_iter=descent.steps,
        num_random_init=1,
        batch_size=descent.batch,
        verbose=False,
    )

    def run(x: Tensor, y: Tensor) -> Tensor:
        points = attack.generate(x.cpu().numpy(), y.cpu().numpy())
        return torch.from_numpy(points).to(x)

    return run


def torchattacks_square(module: nn.Module, eps: float, queries: int, seed: int) -> Points:
    """torchattacks' Square with AutoAttack's numbers, but so many queries."""
    import torchattacks

    attack = torchattacks.Square(
        module,
        norm="Linf",
        eps=eps,
        n_queries=queries,
        n_restarts=1,
        p_init=0.8,
        loss="margin",
        resc_schedule=False,
        seed=seed,
    )
    return batched(attack, 64)


def torchattacks_part(
    part: str, plain: Plain, classes: int, x: Tensor, y: Tensor, eps: float, seed: int
) -> Tensor:
    """(B,) which samples fall to one component, inside the ball and on the plain model.

    The model is a plain one in eval mode: torchattacks puts a wrapper that is in train mode back into it after every
    attack, which a classifier's session would keep.
    """
    attack = build(part, plain, eps, seed, classes)
    with torch.no_grad():
        x_adv = attack(x, y).detach()
        wrong = misclassified(plain(x_adv), y)
    return wrong & Linf(eps + 1e-6).inside(x_adv, x, (0.0, 1.0))


PEERS: dict[str, Peer] = {
    "torchattacks": Peer("torchattacks", "torchattacks", torchattacks_pgd),
    "foolbox": Peer("foolbox", "foolbox", foolbox_pgd),
    "art": Peer("art", "adversarial-robustness-toolbox", art_pgd),
}


def available(
    peers: Mapping[str, Peer], only: Sequence[str], bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[dict[str, Peer], dict[str, str]]:
    """The wanted peers that can run here, and a line for each of the others.

    Args:
        peers: all there are; only: the wanted ones, all if empty.
        bounds: the box of the subject; torchattacks knows [0, 1] only.
    """
    here: dict[str, Peer] = {}
    skipped: dict[str, str] = {}
    for name, peer in peers.items():
        if only and name not in only:
            continue
        if importlib.util.find_spec(peer.package) is None:
            skipped[name] = (
                f"{name} is not installed; in an environment of its own: pip install {peer.distribution}"
            )
        elif peer.package == "torchattacks" and bounds != (0.0, 1.0):
            skipped[name] = f"{name} knows the box [0, 1] only, not {list(bounds)}"
        else:
            here[name] = peer
    return here, skipped


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what peers warn of while they are imported and built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
