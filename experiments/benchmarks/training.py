"""A step of adversarial training against its bare gradients, a plain PyTorch loop and ART's trainer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.defenses.training.adversarial import inner_points
from robust.defenses.training.pgd_at import PGDAT
from robust.experiments.benchmarks.harness import (
    Benchmark,
    Contestant,
    Work,
    WrongResult,
    alternate,
    ratios,
    timing_row,
)
from robust.experiments.benchmarks.peers import PEERS, Peer, available, quiet
from robust.learner import Arithmetic, Learner
from robust.optimise import Settings
from robust.trainer import Training
from robust.twin import Precision

STEPS, BATCH, RATE = 7, 128, 1e-3
LOOP, ART = "float32 loop", "art"
_BARE = "bare gradients, "
_WEAKER = 0.97  # of the plain loop's adversarial loss: what an inner attack must reach


@dataclass(frozen=True)
class TrainingStep(Benchmark):
    """Steps of PGD-7 adversarial training on batches of 128.

    Ours in each arithmetic stand beside the seven input gradients and one weight gradient that they consist of, in the
    same arithmetic and on the same twin, beside a plain float32 loop, and beside ART's AdversarialTrainerMadryPGD.

    Attributes:
        libraries: the peers to measure against.
    """

    name: ClassVar[str] = "training"
    peers: ClassVar[tuple[str, ...]] = (ART,)
    samples: ClassVar[int] = 2 * BATCH
    modes: ClassVar[tuple[Precision, ...]] = ("float32", "bfloat16")
    libraries: Mapping[str, Peer] = field(default_factory=lambda: {ART: PEERS[ART]})

    def measure(self, work: Work) -> dict[str, Any]:
        """See `Benchmark.measure`."""
        clf, x, y = work.load()
        x, y = x.to(clf.device, torch.float32), y.to(clf.device)
        clf.check(x)
        task = _Task(clf, x, y, work.eps, work.seed)
        modes = cast(tuple[Arithmetic, ...], work.modes or self.modes)
        libraries, skipped = available(self.libraries, work.only, clf.bounds)
        entries = [Contestant(mode, task.ours(mode), ours=True, check=task.judge(mode)) for mode in modes]
        entries += [Contestant(_BARE + mode, task.bare(mode)) for mode in modes]
        entries += [Contestant(LOOP, task.loop())]
        entries += [Contestant(name, task.art()) for name in libraries]
        timings, order = alternate(entries, work.repeats, clf.device, work.say)
        steps = -(-len(x) // BATCH)
        rivals = [LOOP, *libraries]
        against = {rival: ratios(timings, dict.fromkeys(modes, rival)) for rival in rivals}
        bare = ratios(timings, {_BARE + mode: mode for mode in modes})
        return {
            "model": {"name": clf.name, "digest": clf.digest(), "n": len(x), "shape": list(x.shape[1:])},
            "attack": {"steps": STEPS, "step_size": task.step_size, "batch": BATCH, "training_steps": steps},
            "contestants": timings,
            "order": order,
            "ratios": against[LOOP],
            "against": against,
            "overhead": {mode: bare[_BARE + mode] for mode in modes},
            "skipped": skipped,
        }

    def table(self, record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """See `Benchmark.table`."""
        rivals = list(record["against"])
        heads = ["PGD-7 training", "seconds", "first call", *(f"faster than {r}" for r in rivals)]
        heads += ["of its bare gradients", "adversarial loss"]
        rows = []
        for name, one in record["contestants"].items():
            faster = [record["against"][rival].get(name) for rival in rivals]
            over = record["overhead"].get(name)
            row = timing_row(record, name)[:3]
            row += ["" if ratio is None else f"{ratio['median']:.2f}×" for ratio in faster]
            row += ["" if over is None else f"{over['median']:.2f}×"]
            rows.append([*row, f"{one['adversarial_loss']:.3f}" if "adversarial_loss" in one else ""])
        return heads, rows


class _Task:
    """The same steps for everybody, each on a copy of the model of its own."""

    def __init__(self, clf: Classifier, x: Tensor, y: Tensor, eps: float, seed: int) -> None:
        self.clf, self.x, self.y, self.eps, self.seed = clf, x, y, eps, seed
        self.step_size = 2.5 * eps / STEPS
        self.recipe = PGDAT(eps=eps, steps=STEPS, step_size=self.step_size)

    def copy(self) -> Classifier:
        """The classifier before its first step, its weights free to move."""
        module = copy.deepcopy(self.clf.module).train().requires_grad_(True)
        mean, std = self.clf.mean.flatten().tolist(), self.clf.std.flatten().tolist()
        return Classifier(module, self.clf.bounds, mean, std, self.clf.device, self.clf.name)

    def learner(self, mode: Arithmetic) -> Learner:
        """Ours before its first step, its twin made, in the memory format it trains in."""
        clf = Learner(self.copy(), mode)
        clf.module.to(memory_format=torch.channels_last)
        with clf.session():
            clf.check(self.x)
            clf.training_twin(self.x)
        return clf

    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        index = torch.arange(len(self.x), device=self.x.device)
        return list(zip(self.x.split(BATCH), self.y.split(BATCH), index.split(BATCH), strict=True))

    def ours(self, mode: Arithmetic) -> Callable[[], Any]:
        """One epoch of the training loop, as `robust.fit` runs it."""
        steps = -(-len(self.x) // BATCH)
        walk = Settings(
            epochs=1_000_000, batch_size=BATCH, lr=RATE, optimizer="sgd", schedule="constant", seed=self.seed,
            channels_last=True, precision=mode,
        )  # fmt: skip
        training = Training(self.copy(), self.x, self.y, walk, self.recipe)

        def call() -> Any:
            return [training.advance()[0] for _ in range(steps)]

        return call

    def judge(self, mode: Arithmetic) -> Callable[[Any], dict[str, Any]]:
        """Ours must find points as strong as the plain loop's, on the original in float32."""

        def check(_: Any) -> dict[str, Any]:
            ours, theirs = self.learner(mode), self.plain()
            x, y, index = self.batches()[0]
            found = inner_points(self.recipe.attack(), ours, x, y, index, self.seed)
            other = self.descend(theirs, x, y)
            loss, floor = (float(F.cross_entropy(self.clf.logits(p), y)) for p in (found, other))
            if loss < _WEAKER * floor:
                raise WrongResult(f"{mode}: its points' loss is {loss:.3f}, a plain loop's {floor:.3f}")
            return {"adversarial_loss": loss, "plain_adversarial_loss": floor}

        return check

    def bare(self, mode: Arithmetic) -> Callable[[], Any]:
        """Seven input gradients on the twin and one weight gradient, and nothing else."""
        clf = self.learner(mode)
        twin: Any = clf.training_twin(self.x)

        def call() -> None:
            for x, y, _ in self.batches():
                for _ in range(STEPS):
                    at = x.detach().requires_grad_(True)
                    torch.autograd.grad(F.cross_entropy(twin(at), y, reduction="sum"), at)
                clf.module.zero_grad(set_to_none=True)
                F.cross_entropy(clf(x), y).backward()

        return call

    def plain(self) -> nn.Module:
        """The classifier as people write it: one module from [0, 1] to logits, contiguous, in float32."""
        clf = self.copy()
        return _Normalised(clf.module, clf.mean, clf.std)

    def descend(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """PGD from a random start as people write it."""
        module.eval()
        at = x + torch.empty_like(x).uniform_(-self.eps, self.eps)
        at = at.clamp(*self.clf.bounds)
        for _ in range(STEPS):
            at.requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(module(at), y), at)
            at = at.detach() + self.step_size * gradient.sign()
            at = torch.min(torch.max(at, x - self.eps), x + self.eps).clamp(*self.clf.bounds)
        return at

    def loop(self) -> Callable[[], Any]:
        """Madry's training in a page of PyTorch."""
        module = self.plain()
        optimizer = torch.optim.SGD(module.parameters(), RATE, momentum=0.9, nesterov=True)

        def call() -> None:
            for x, y, _ in self.batches():
                at = self.descend(module, x, y)
                module.train()
                optimizer.zero_grad()
                F.cross_entropy(module(at), y).backward()
                optimizer.step()

        return call

    def art(self) -> Callable[[], Any]:
        """ART's trainer, an epoch."""
        with quiet():
            from art.defences.trainer import AdversarialTrainerMadryPGD
            from art.estimators.classification import PyTorchClassifier

            module = self.plain()
            estimator = PyTorchClassifier(
                model=module, loss=nn.CrossEntropyLoss(), input_shape=tuple(self.x.shape[1:]),
                nb_classes=self.clf.classes, clip_values=self.clf.bounds, device_type=self.clf.device.type,
                optimizer=torch.optim.SGD(module.parameters(), RATE, momentum=0.9, nesterov=True),
            )  # fmt: skip
            trainer = AdversarialTrainerMadryPGD(
                estimator,
                nb_epochs=1,
                batch_size=BATCH,
                eps=self.eps,
                eps_step=self.step_size,
                max_iter=STEPS,
            )
        trainer.attack.set_params(verbose=False)
        x, y = self.x.cpu().numpy(), self.y.cpu().numpy()

        def call() -> None:
            with quiet(), redirect_stderr(io.StringIO()):  # its bars cannot be switched off
                trainer.fit(x, y)

        return call


class _Normalised(nn.Module):
    """A module with its normalisation in front."""

    mean: Tensor
    std: Tensor

    def __init__(self, inner: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of x (N, C, H, W) in the box."""
        logits: Tensor = self.inner((x - self.mean) / self.std)
        return logits
