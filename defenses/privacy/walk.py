"""What `robust.fit` asks of differential privacy: calibrated noise, Poisson samples, a ledger, and what it cost."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust.defenses.privacy.accountants.base import Unanswered
from robust.defenses.privacy.accounting import SAMPLINGS, Epsilon, Mechanism, Phase, spent
from robust.defenses.privacy.calibrate import Budget, calibrate
from robust.defenses.privacy.clipping import CLIPPINGS, Adaptive, Clipping
from robust.defenses.privacy.ledger import Ledger, read_ledger
from robust.defenses.privacy.monitor import Monitor
from robust.defenses.privacy.noise import KeyedNoise
from robust.defenses.privacy.private import make_private
from robust.errors import ConfigError, ModelError, RunError
from robust.privacy import LEDGER, Privacy
from robust.rng import derive

_GIVEN = (
    "what the training was given (model, first weights, normalisation, other models, options) was chosen without "
    "looking at these records, and their number is no secret"
)
_COUNT = "adaptive clipping's noisy count is covered by the noise multiplier, which stands for the whole step"


class Walk:
    """The privacy of one training; see `robust.privacy.PrivateWalk`.

    **Guarantee.** The steps taken are (epsilon, delta)-differentially private under adding or removing one sample:
    each is the Gaussian mechanism on a Poisson sample, booked on disk before it is taken. A training that is killed and
    resumed takes the same steps with the same noise, whose seed is in its checkpoints; they count once. In secure mode
    the noise cannot be drawn again, and elsewhere (a GPU, other threads, another library) sums are rounded otherwise:
    there what is repeated counts twice.

    Args:
        privacy: what to keep.
        module: the model, whose layers keep samples apart until `close`.
        optimizer: the one that takes the noisy gradients.
        count: training samples; batch_size: the expected size of a step's sample; epochs: each of count / batch_size
            steps, rounded.

    Raises:
        ConfigError: a delta or a budget that makes no sense here. ModelError: a layer mixes samples; the line names it.
    """

    def __init__(
        self,
        privacy: Privacy,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        count: int,
        batch_size: int,
        epochs: int,
    ) -> None:
        delta = privacy.delta
        assert delta is not None
        if delta * count >= 1:
            raise ConfigError(
                f"delta={delta:g} lets one of {count} samples be published; it must be well below 1/{count}"
            )
        self.privacy, self.count, self.delta = privacy, count, delta
        self.batch_size, self.rate = batch_size, batch_size / count
        self.per_epoch = max(1, round(count / batch_size))
        self.steps = epochs * self.per_epoch
        self.over = False
        self.budget = _budget(privacy, delta)
        self.module, self.inner = module, optimizer
        self.noise_multiplier = 1.0 if privacy.noise_multiplier is None else privacy.noise_multiplier
        training = [(part, part.training) for part in module.modules()]
        module.train()  # layers are looked at as they will run
        try:
            self.optimizer = make_private(
                module, optimizer, None, noise_multiplier=self.noise_multiplier, clipping=self.clipping(),
                expected_batch_size=batch_size, secure_mode=privacy.secure_mode,
            )[1]  # fmt: skip
        finally:
            for part, mode in training:
                part.training = mode
        try:
            self.mechanism = self._measured()
            self.monitor = None if self.budget is None else Monitor(self.budget)
        except BaseException:
            self.optimizer.engine.release()
            raise
        self.noise_multiplier = self.mechanism.noise_multiplier
        self.optimizer.noise_multiplier = self.noise_multiplier
        self.optimizer.clipping = self.clipping()
        self.optimizer.sample_rate = self.rate
        self.optimizer.attach_step_hook(lambda _: self._book())
        self.ledger: Ledger | None = None
        self._phases: list[Phase] = []
        on_cpu = all(p.device.type == "cpu" for p in module.parameters())
        self.exact = (
            on_cpu and not privacy.secure_mode
        )  # whether a step that is repeated is the same to the bit
        self._rows, self._still = 0, dict[str, tuple[Tensor, int]]()

    def clipping(self) -> Clipping:
        """The clipping with its options; adaptive clipping's count has a twentieth of the batch as its noise."""
        name, bound = self.privacy.clipping.replace("-", "_"), self.privacy.max_grad_norm
        if name == Adaptive.name:
            deviation = max(self.batch_size / 20, 2 * self.noise_multiplier)
            return Adaptive(max_grad_norm=bound, unclipped_num_std=deviation)
        return CLIPPINGS[name](max_grad_norm=bound)

    def _measured(self) -> Mechanism:
        """The step to take: its noise is given, or found for the budget over all steps."""
        if (noise := self.privacy.noise_multiplier) is None:
            assert self.budget is not None
            return calibrate(
                target_epsilon=self.budget.epsilon, delta=self.delta, sample_rate=self.rate, steps=self.steps,
                accountant=self.budget.accountant,
            ).mechanism  # fmt: skip
        mechanism = Mechanism(noise_multiplier=noise, sample_rate=self.rate)
        if self.budget is not None and not self.budget.keeps([(mechanism, 1)]):
            raise ConfigError(
                f"not even one step with noise_multiplier={noise:g} keeps epsilon {self.budget.epsilon:g} at delta "
                f"{self.delta:g}; take more noise, or leave it out"
            )
        if self.budget is None:  # an unknown accountant, or one that cannot serve, is told now
            spent([(mechanism, 0)], delta=self.delta, accountant=self.privacy.accountant)
        return mechanism

    # -- state ----------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """See `PrivateWalk`."""
        found = {"noise_multiplier": self.noise_multiplier, "sample_rate": self.rate, "steps": self.steps}
        return {**self.privacy.to_dict(), **found}

    def state(self, *, over: bool) -> dict[str, Tensor]:
        """See `PrivateWalk`."""
        private = self.optimizer
        found = {
            "steps": torch.tensor(private.steps),
            "max_grad_norm": torch.tensor(private.max_grad_norm, dtype=torch.float64),
            "history": torch.tensor(private.history, dtype=torch.float64).reshape(-1, 3),
            "over": torch.tensor(over),
            "place": torch.tensor(place() if self.exact else 0),
        }
        return found if over or private.seed is None else {**found, "seed": torch.tensor(private.seed)}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """See `PrivateWalk`."""
        self.over = bool(tensors["over"])
        self.exact = self.exact and int(tensors["place"]) == place()
        seed = int(tensors["seed"]) if "seed" in tensors and self.exact else self.optimizer.seed
        if "seed" not in tensors and not self.over and not self.privacy.secure_mode:
            raise RunError("the noise's seed is not in this checkpoint")
        own = {
            "steps": int(tensors["steps"]),
            "seed": seed,
            "by_sum": True,
            "max_grad_norm": float(tensors["max_grad_norm"]),
            "history": tensors["history"].tolist(),
        }
        self.optimizer.load_state_dict({**self.inner.state_dict(), "private": own})

    # -- the ledger -----------------------------------------------------------------------------------------------

    def require_new(self, folder: Path) -> None:
        """See `PrivateWalk`."""
        path = folder / LEDGER
        if path.exists() and (booked := sum(phase.steps for phase in read_ledger(path))):
            raise RunError(
                f"{path} has {booked} steps booked, of a training whose checkpoint is gone; choose another out folder"
            )

    def open(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        """See `PrivateWalk`."""
        if folder is None:
            return
        path = folder / LEDGER
        phases = read_ledger(path) if path.exists() else []
        if (booked := sum(phase.steps for phase in phases)) < (taken := self.optimizer.steps):
            raise RunError(
                f"{path} has {booked} steps booked, but the checkpoint beside it has taken {taken}; put its own "
                "ledger there"
            )
        if self.over:
            self._phases = phases
            return
        self.ledger = Ledger(path, run=self._run(identity))
        if self.budget is not None:
            self.monitor = Monitor(self.budget, ledger=self.ledger)

    def _run(self, identity: Mapping[str, Any]) -> str | None:
        """A name that only this training's repetitions have; none where they are others."""
        if (seed := self.optimizer.seed) is None or not self.exact:
            return None
        text = json.dumps(identity, sort_keys=True).encode()
        return hashlib.blake2b(text, key=seed.to_bytes(8, "little"), digest_size=8).hexdigest()

    def close(self) -> None:
        """See `PrivateWalk`."""
        self._phases = self.phases()
        if self.ledger is not None:
            self.ledger.close()
        self.ledger = self.monitor = None
        self.optimizer.engine.release()

    def phases(self) -> list[Phase]:
        """What was spent."""
        if self._phases:
            return self._phases
        if self.ledger is not None:
            return self.ledger.phases()
        steps = self.optimizer.steps
        return [Phase(self.mechanism, steps, fresh=True)] if steps else []

    def _book(self) -> None:
        named = self.ledger is not None and self.ledger.named
        step = self.optimizer.steps if named else None
        if self.monitor is not None:
            self.monitor.take(self.mechanism, step=step)
        elif self.ledger is not None:
            self.ledger.book(self.mechanism, step=step)

    # -- steps ----------------------------------------------------------------------------------------------------

    def fits(self, step: int) -> bool:
        """See `PrivateWalk`."""
        if self.monitor is None:
            return True
        known = self.ledger is not None and self.ledger.named and self.ledger.covers(self.mechanism, step)
        return known or self.monitor.fits(self.mechanism)

    def rows(self, step: int) -> Tensor:
        """See `PrivateWalk`."""
        return self.optimizer.noise.chosen(self.count, self.rate, step)

    def seed(self, step: int) -> int:
        """See `PrivateWalk`."""
        noise = self.optimizer.noise
        if isinstance(noise, KeyedNoise):
            return derive(noise.seed, "module", step)
        return torch.Generator().seed() >> 1  # the system's own randomness

    def begin(self, *, last: bool, rows: int) -> None:
        """See `PrivateWalk`."""
        self.optimizer.zero_grad()
        self.optimizer.expect(last)
        if not rows:
            self.optimizer.consume_empty()
        self._rows, self._still = rows, {name: (v, v._version) for name, v in self._untrained().items()}

    def end(self) -> None:
        """See `PrivateWalk`.

        Raises:
            ModelError: more of the samples than their clipped gradients would be kept.
        """
        if (looks := self.optimizer.looks) and looks != [self._rows]:
            raise ModelError(
                f"the loss takes weight gradients of {' and '.join(map(str, looks))} samples for a batch of "
                f"{self._rows}, so that a sample has more than one share of the sum; call the model on each sample "
                "once in a call, and leave backward() to the training"
            )
        for name, value in self._untrained().items():
            if name not in self._still or not _same(*self._still[name], value):
                raise ModelError(
                    f"buffer {name} changes as the model trains, which keeps something of the samples without noise; "
                    "make it constant"
                )
        self.optimizer.step()

    def _untrained(self) -> dict[str, Tensor]:
        """What of the model is saved and not trained."""
        found: dict[str, Tensor] = {n: p for n, p in self.module.named_parameters() if not p.requires_grad}
        for prefix, part in self.module.named_modules():
            for name, value in part.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                    found[name] = value
        return found

    # -- the account ----------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """See `PrivateWalk`: `epsilon` is None where it is infinite, or too large to be computed."""
        phases, how = self.phases(), SAMPLINGS["poisson"]
        cost = self._cost(phases)
        more = [_GIVEN, *([_COUNT] if self.privacy.clipping == Adaptive.name else [])]
        return {
            "epsilon": None if cost is None else cost.to_dict()["epsilon"],
            "delta": self.delta,
            "accountant": self.privacy.accountant,
            "guaranteed": cost is not None and cost.about.guaranteed,
            "target_epsilon": self.privacy.epsilon,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.rate,
            "expected_batch_size": self.batch_size,
            "steps": sum(phase.steps for phase in phases),
            "max_grad_norm": self.privacy.max_grad_norm,
            "clipping": self.privacy.clipping,
            "augmentations": self.privacy.augmentations,
            "secure_mode": self.privacy.secure_mode,
            "sampling": how[0],
            "neighbours": how[1],
            "assumptions": [*(() if cost is None else cost.about.assumptions), *more],
        }

    def _cost(self, phases: list[Phase]) -> Epsilon | None:
        try:
            return spent(phases, delta=self.delta, accountant=self.privacy.accountant)
        except Unanswered:
            return None


def place() -> int:
    """A number for what rounds a sum on a CPU: libraries, kind of processor, threads."""
    kind = platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return derive(0, "place", torch.__version__, np.__version__, *kind)


def _same(before: Tensor, version: int, after: Tensor) -> bool:
    """Whether a tensor was left alone since it had this version."""
    return after is before and after._version == version


def _budget(privacy: Privacy, delta: float) -> Budget | None:
    if privacy.epsilon is None:
        return None
    return Budget(epsilon=privacy.epsilon, delta=delta, accountant=privacy.accountant)
